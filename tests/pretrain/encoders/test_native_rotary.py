"""Rotary positions of images at their own shape: each image as by itself, whatever lies beside it in the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Encoder, Mask
from pretrain.encoders.dinov3.config import Dinov3Config
from pretrain.encoders.drop_path import drawn
from pretrain.encoders.native import PackedImages, PackedMask
from pretrain.encoders.patches import patchify
from pretrain.encoders.registry import family_of
from pretrain.encoders.vit.config import VitConfig

SIZES = ((16, 40), (24, 24), (8, 16), (48, 8))
GRIDS = tuple((height // 8, width // 8) for height, width in SIZES)
SMALL: dict[str, Any] = {"dim": 32, "depth": 3, "heads": 2, "patch": 8, "registers": 2, "layer_scale": 0.3}
VARIES = {"shift": 0.2, "jitter": 1.3, "rescale": 2.0}
CONFIGS = {
    "vit": VitConfig(**SMALL, positions="rotary"),
    "vit, mean, no class token": VitConfig(
        **{**SMALL, "registers": 0}, positions="rotary", rotary={"normalise": "max"}, class_token=False, pool="mean"
    ),
    "vit, no positions": VitConfig(**SMALL, positions="none"),
    "dinov3": Dinov3Config(**SMALL, mlp="swiglu", class_norm=True),
    "dinov3, mean": Dinov3Config(**SMALL, pool="mean", norm="rms", rope={"normalise": "min"}),
}


def make(config: VitConfig | Dinov3Config) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(config, (24, 24), mask_token=True).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return encoder


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


def packed(several: list[Tensor]) -> PackedImages:
    return PackedImages(torch.cat([patchify(image[None], 8)[0] for image in several]), GRIDS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("hidden", ["nothing", "dropped", "replaced"])
def test_each_image_is_as_by_itself(name: str, hidden: str) -> None:
    encoder = make(CONFIGS[name])
    assert encoder.native
    assert family_of(CONFIGS[name]).native(CONFIGS[name])
    generator = torch.Generator().manual_seed(2)
    maps = [torch.rand(grid, generator=generator) < 0.4 for grid in GRIDS]
    for one in maps:
        one[0, 0] = False
    flat = torch.cat([one.flatten() for one in maps])
    mask = {
        "nothing": PackedMask(),
        "dropped": PackedMask((~flat).nonzero()[:, 0], tuple(int((~one).sum()) for one in maps)),
        "replaced": PackedMask(token=flat),
    }[hidden]
    found = encoder(packed(images()), mask, layers=(1,))
    for number, (image, one, own) in enumerate(zip(images(), maps, found.of_images(), strict=True)):
        alone_mask = {"nothing": None, "dropped": Mask(drop=one[None]), "replaced": Mask(token=one[None])}[hidden]
        alone = encoder(image[None], alone_mask, layers=(1,))
        torch.testing.assert_close(own, alone.tokens[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pooled[number], alone.pooled[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.layers[0].of_images()[number], alone.layers[0].tokens[0], rtol=1e-4, atol=1e-5)
        if alone.prefix_tokens is not None:
            torch.testing.assert_close(found.prefix_tokens[number], alone.prefix_tokens[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config", [VitConfig(**SMALL, positions="rotary", rotary=VARIES), Dinov3Config(**SMALL, rope=VARIES)]
)
def test_drawn_coordinates_are_the_same_for_all_images(config: VitConfig | Dinov3Config) -> None:
    encoder = make(config).train()
    seen = []
    for step in (0, 1):
        with drawn(3, step, torch.arange(4)):
            together = encoder(packed(images()))
        seen.append(together.tokens)
        for image, own in zip(images(), together.of_images(), strict=True):
            with drawn(3, step, torch.arange(1)):
                torch.testing.assert_close(own, encoder(image[None]).tokens[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*seen, atol=1e-3)


def test_positions_go_with_their_tokens() -> None:
    """Another order of the images moves their tokens and nothing else; gradients reach every weight."""
    encoder = make(CONFIGS["dinov3"])
    found = encoder(packed(images()))
    order = (2, 0, 3, 1)
    parts = packed(images()).patches.split([rows * columns for rows, columns in GRIDS])
    moved = encoder(PackedImages(torch.cat([parts[n] for n in order]), tuple(GRIDS[n] for n in order)))
    for place, number in enumerate(order):
        torch.testing.assert_close(moved.of_images()[place], found.of_images()[number], rtol=1e-4, atol=1e-5)
    encoder(packed(images()), PackedMask(token=torch.arange(sum(map(len, parts))) % 2 == 0)).pooled.sum().backward()
    assert rearrange(encoder.mask_token.grad, "1 1 d -> d").abs().sum() > 0
    assert not make(Dinov3Config(**SMALL, local_class_norm=True)).native
