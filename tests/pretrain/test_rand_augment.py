"""RandAugment on batches against timm's, an image at a time by Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment as theirs
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pretrain.methods.finetune import rand_augment as ours
from pretrain.methods.finetune.config import RandAugmentConfig
from pretrain.methods.finetune.rand_augment import OPS, Ops, augment, draw_ops

FILL = (124, 116, 104)
NAMES = [
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
]  # fmt: skip
INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")


def smooth_images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 6, generator=generator)
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 255).clamp(0, 255).byte()


def by_pillow(name: str, image: Tensor, value: float) -> Tensor:
    """`image` (3, h, w) after timm's op."""
    picture = Image.fromarray(rearrange(image, "c h w -> h w c").numpy())
    arguments: dict[str, Any] = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
    given = () if name in ("AutoContrast", "Equalize", "Invert") else (value,)
    if name in ("Posterize", "Solarize", "SolarizeAdd"):
        given = (int(value),)
    return rearrange(
        torch.from_numpy(np.array(theirs.NAME_TO_OP[name](picture, *given, **arguments))), "h w c -> c h w"
    )


@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_an_op_is_timms(place: int) -> None:
    images, name = smooth_images(3, 40, 48), NAMES[place]
    level = np.array([0.3, 0.8, 0.55])
    values = OPS[place].value(level, np.array([0.3, -0.8, 0.55]), True)
    found = augment(images, Ops(np.full((3, 1), place), values[:, None]), torch.tensor(FILL).float())
    for image, changed, value in zip(images, found, values, strict=True):
        off = (changed - by_pillow(name, image, float(value)).float()).abs()
        # at the border of what comes into view, Pillow shows the fill where we blend it with the image
        assert off.quantile(0.93) <= 1.01 if place in (3, 11, 12, 13, 14) else off.max() <= 2


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_a_strength_is_timms(place: int, increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAMES[place] + ("Increasing" if increasing and NAMES[place] in INCREASING else "")
    of = theirs.LEVEL_TO_ARG[name]
    for sign, drawn in ((-1, 0.9), (1, 0.1)):
        monkeypatch.setattr(theirs.random, "random", lambda drawn=drawn: drawn)
        for magnitude in (0.0, 3.3, 9.0, 10.0):
            wanted = of(magnitude, {})[0] if of is not None else 0
            level = np.array([magnitude / 10])
            assert OPS[place].value(level, sign * level, increasing)[0] == pytest.approx(wanted)


def test_what_is_drawn() -> None:
    config, rows = RandAugmentConfig(magnitude=6, prob=0.5, magnitude_std=0.5), np.arange(3000)
    drawn = draw_ops(config, 1, 2, rows)
    assert drawn.ops.shape == (3000, 2)
    shares = np.bincount(drawn.ops.reshape(-1) + 1, minlength=16) / 6000
    assert shares[0] == pytest.approx(0.5, abs=0.03)
    assert shares[1:] == pytest.approx(np.full(15, 0.5 / 15), abs=0.012)
    turns = drawn.values[drawn.ops == 3]
    assert np.abs(turns).mean() == pytest.approx(18, abs=0.7)
    assert np.abs(turns).std() == pytest.approx(1.5, abs=0.5)
    assert (turns < 0).mean() == pytest.approx(0.5, abs=0.12)
    again = draw_ops(config, 1, 2, rows[1000:1010])
    assert np.array_equal(again.values, drawn.values[1000:1010])


def test_an_image_alone_is_an_image_of_many() -> None:
    images = smooth_images(6, 24, 24)
    drawn = draw_ops(RandAugmentConfig(prob=1.0), 0, 0, np.arange(6))
    fill = torch.tensor(FILL).float()
    whole = augment(images, drawn, fill)
    for place in range(6):
        alone = augment(images[place : place + 1], Ops(*(part[place : place + 1] for part in drawn)), fill)
        assert torch.equal(alone[0], whole[place])
    assert whole.min() >= 0
    assert whole.max() <= 255
    assert torch.equal(whole, whole.round())


def test_a_flat_image_stays_one() -> None:
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    for op in (ours.autocontrast, ours.equalise):
        assert torch.equal(op(flat.float(), torch.zeros(1, 1, 1, 1), torch.zeros(3)), flat.float())
