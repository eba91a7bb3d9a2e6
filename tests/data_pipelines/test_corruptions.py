"""Corruptions: what they promise of every image, and each at its own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.corruptions import CORRUPTIONS, _cloud, _disc, _line, corrupted, rotated


def images(num: int = 2, channels: int = 3, side: int = 32, bits: int = 8) -> Tensor:
    """Smooth, with an edge: most corruptions do nothing to what is flat."""
    rng = np.random.default_rng(0)
    across = np.linspace(0.2, 0.8, side)
    made = np.stack([across[None, :] * across[:, None] + 0.2 * rng.random() for _ in range(num * channels)])
    made[:, side // 3 :, : side // 2] *= 0.4
    levels = np.clip(made, 0, 1).reshape(num, channels, side, side) * (2**bits - 1)
    return torch.from_numpy(levels.astype(np.uint8 if bits == 8 else np.uint16))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "bits"), [(3, 8), (1, 8), (6, 16)])
def test_what_is_drawn_depends_on_seed_strength_and_sample_alone(name: str, channels: int, bits: int) -> None:
    given = images(2, channels, bits=bits)
    before = given.clone()
    made = corrupted(given, torch.tensor([4, 9]), name, 3)
    assert torch.equal(given, before)
    assert (made.shape, made.dtype) == (given.shape, given.dtype)
    assert not torch.equal(made, given)
    turned = corrupted(given.flip(0), torch.tensor([9, 4]), name, 3)
    assert torch.equal(turned.flip(0), made)
    drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg")
    for ids, seed in (([4, 9], 1), ([5, 8], 0)):
        other = corrupted(given, torch.tensor(ids), name, 3, seed)
        assert torch.equal(other, made) is not drawn


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "elastic"])
def test_stronger_is_farther_from_the_image(name: str) -> None:
    given = images(4, side=53)

    def far(strength: int) -> float:
        made = corrupted(given, torch.arange(4), name, strength).double()
        return float((made - given.double()).square().mean())

    assert far(1) < far(3) < far(5)


def test_noise_is_of_the_published_size() -> None:
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    ids = torch.arange(4)
    for strength, deviation in ((1, 0.08), (3, 0.18)):
        made = corrupted(grey, ids, "gaussian_noise", strength).double() / 255
        assert float(made.std()) == pytest.approx(deviation, rel=0.05)
    shot = corrupted(grey, ids, "shot_noise", 2).double() / 255
    assert float(shot.std()) == pytest.approx((128 / 255 / 25) ** 0.5, rel=0.05)
    impulse = corrupted(grey, ids, "impulse_noise", 4)
    assert float(((impulse == 0) | (impulse == 255)).double().mean()) == pytest.approx(0.17, rel=0.05)


def test_contrast_and_brightness_are_what_they_say() -> None:
    given = images(1).double()[0] / 255
    mean = given.mean(dim=(1, 2), keepdim=True)
    made = corrupted(images(1), torch.tensor([0]), "contrast", 2).double()[0] / 255
    torch.testing.assert_close(made, (given - mean) * 0.3 + mean, atol=0.003, rtol=0)
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(corrupted(black, torch.tensor([0]), "brightness", 2), torch.full_like(black, 51))


@pytest.mark.parametrize("radius", [0.4, 1.3, 5.0])
def test_blurs_keep_all_light(radius: float) -> None:
    disc = _disc(radius)
    assert disc.sum() == pytest.approx(1, abs=1e-5)
    covered = (disc > 0.5 * disc.max()).sum()
    assert covered == pytest.approx(np.pi * max(radius, 0.6) ** 2, rel=0.35, abs=1)
    line = _line(radius, radius / 3, 0.6)
    assert line.sum() == pytest.approx(1, abs=1e-5)
    rows, columns = np.nonzero(line)
    assert columns.max() <= len(line) // 2 + np.ceil(radius) + 1
    assert rows.min() >= len(line) // 2


def test_clouds_are_smooth_when_detail_decays_fast() -> None:
    def roughness(decay: float) -> float:
        cloud = _cloud(64, decay, np.random.RandomState(0))
        assert (cloud.shape, cloud.min(), cloud.max()) == ((64, 64), 0, 1)
        return float(np.abs(np.diff(cloud, axis=0)).mean())

    assert roughness(3.0) < roughness(2.0) < roughness(1.3)


def test_turns_are_exact_by_right_angles_and_keep_what_is_round() -> None:
    given = images(2)
    ids = torch.tensor([3, 8])
    assert torch.equal(rotated(given, ids, 90), torch.rot90(given, 1, (2, 3)))
    assert torch.equal(rotated(rotated(given, ids, 270), ids, 90), given)
    axis = torch.arange(33) - 16
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2).expand(20, 1, 33, 33).div(4).clamp_max(255).to(torch.uint8)
    turned = rotated(disc, torch.arange(20), 30)
    inside = slice(6, -6)
    difference = (turned.int() - disc.int()).abs()[:, :, inside, inside]
    assert int(difference.max()) <= 2
    steps = torch.zeros(20, 1, 33, 33, dtype=torch.uint8)
    steps[:, :, :16] = 200
    assert len(torch.unique(rotated(steps, torch.arange(20), 30), dim=0)) == 2  # to the left or to the right


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no corruption 'snow'; there are gaussian_noise"):
        corrupted(images(), torch.arange(2), "snow", 1)
    with pytest.raises(ValueError, match="strength is 6"):
        corrupted(images(), torch.arange(2), "fog", 6)
