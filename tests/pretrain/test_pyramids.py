"""PVT v2, Twins-SVT and Swin v2: timm's own numbers on whole images, and what pyramids promise of masks and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from einops import rearrange
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from data_pipelines.rng import Stream
from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.attention_maps import class_token_attention
from pretrain.encoders.base import Mask, refine
from pretrain.encoders.pvt_v2.config import PvtV2Config
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.twins.config import TwinsConfig
from pretrain.encoders.vit.config import VitConfig
from pretrain.stream.masking import one_in_2x2, random_units

STAGES: dict[str, Any] = {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 2), "heads": (1, 2, 2, 4)}
CONFIGS = {
    "pvt_v2": PvtV2Config(size="b0", **STAGES),
    "pvt_v2 linear": PvtV2Config(size="b5", linear=True, **STAGES),
    "twins": TwinsConfig(window=3, **{**STAGES, "depths": (2, 2, 2, 2)}),
    "swin v2": SwinConfig(version=2, dim=8, depths=(2, 2, 2), heads=(1, 2, 4), patch=4, window=4),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]


def make(config: Any, size: tuple[int, int] = (64, 64), channels: int = 3) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(config, size, channels, mask_token=True).eval()
    for name, parameter in encoder.named_parameters():  # branches that start near zero would prove little
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "logit_scale" not in name:
            nn.init.normal_(parameter, std=0.1)
    return encoder


def images(size: tuple[int, int] = (64, 64), seed: int = 0, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def masks(quads: bool, grid: tuple[int, int], count: int = 2) -> Tensor:
    rngs = [Stream(seed) for seed in range(count)]
    drawn = [one_in_2x2(rng, grid) if quads else random_units(rng, grid, grid[0] * grid[1] // 2) for rng in rngs]
    return torch.from_numpy(np.stack(drawn))


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_whole_images_are_timms(config: Any, size: tuple[int, int]) -> None:
    encoder = make(config, size)
    features = encoder(images(size))
    expected = encoder.inner().forward_features(images(size))
    if isinstance(config, PvtV2Config):
        expected = rearrange(expected, "b d h w -> b (h w) d")
    elif isinstance(config, SwinConfig):
        expected = rearrange(expected, "b h w d -> b (h w) d")
    torch.testing.assert_close(features.tokens, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(features.pooled, encoder.inner()(images(size)), rtol=0, atol=1e-6)
    assert features.grid == (size[0] // encoder.stride, size[1] // encoder.stride)


@pytest.mark.parametrize(
    ("config", "name"),
    [(PvtV2Config(size=f"b{n}"), f"pvt_v2_b{n}") for n in range(6)]
    + [(PvtV2Config(size="b2", linear=True), "pvt_v2_b2_li")]
    + [(TwinsConfig(size=size), f"twins_svt_{size}") for size in ("small", "base", "large")]
    + [(SwinConfig(version=2, size="tiny", window=8), "swinv2_tiny_window8_256")]
    + [(SwinConfig(version=2, size="base", window=16), "swinv2_base_window16_256")]
    + [(VitConfig(size="small", distillation_token=True), "deit_small_distilled_patch16_224")],
)
def test_published_sizes_are_timms(config: Any, name: str) -> None:
    size = (256, 256) if isinstance(config, SwinConfig) else (224, 224)
    with torch.device("meta"):
        ours, theirs = build_encoder(config, size).inner(), timm.create_model(name, num_classes=0)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
@pytest.mark.parametrize("unit", [16, 32])
def test_hidden_pixels_change_nothing(config: Any, unit: int, size: tuple[int, int]) -> None:
    encoder = make(config, size)
    grid = (size[0] // unit, size[1] // unit)
    few = random_units(Stream(5), grid, max(1, grid[0] * grid[1] // 3))
    hidden, both = masks(quads=True, grid=grid), torch.from_numpy(np.stack([few, few]))
    for mask, unseen in (
        (Mask(drop=hidden), hidden),
        (Mask(token=both), both),
        (Mask(drop=hidden, token=both), hidden | both),
    ):
        pixels = rearrange(refine(unseen, size), "b h w -> b 1 h w")
        first = encoder(images(size), mask)
        second = encoder(torch.where(pixels, images(size, seed=1), images(size)), mask)
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.pooled, second.pooled)
        shown = encoder(torch.where(pixels, images(size), images(size, seed=1)), mask)
        assert not torch.allclose(first.tokens, shown.tokens)


def isolate(encoder: Encoder) -> None:
    """Cut all that mixes tokens: attention, depth-wise convolutions, and what kernels read beyond their own patch."""
    for block in encoder.blocks():
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            beyond = part.kernel_size[0] - part.stride[0]
            if part.groups > 1:
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
            elif beyond:  # padded by `beyond` above and to the left
                part.weight.data[:, :, :beyond] = 0
                part.weight.data[:, :, :, :beyond] = 0


@pytest.mark.parametrize("unit", [16, 32])
def test_each_token_names_its_units(config: Any, unit: int) -> None:
    size = (128, 64)
    encoder = make(config, size)
    isolate(encoder)
    dropped = masks(quads=True, grid=(size[0] // unit, size[1] // unit))
    fine = min(unit, encoder.stride)
    visible = ~refine(dropped, (size[0] // fine, size[1] // fine))
    features = encoder(images(size), Mask(dropped))
    assert features.ids_keep is not None
    assert features.grid is None
    for row, seen in zip(features.ids_keep, visible, strict=True):
        assert sorted(row.flatten().tolist()) == seen.flatten().nonzero().flatten().tolist()
    for token, units in enumerate(features.ids_keep[0].tolist()):
        for index in units:
            top, left = (side * fine for side in divmod(index, size[1] // fine))
            changed = images(size)
            changed[0, :, top : top + fine, left : left + fine] += torch.randn(3, fine, fine)
            difference = (encoder(changed, Mask(dropped)).tokens[0] - features.tokens[0]).abs().sum(dim=-1)
            assert difference[token] > 0
            assert difference.sum() == difference[token]


def test_local_crops_run(config: Any) -> None:
    encoder = make(config, (128, 128))
    for size in ((96, 96), (32, 32), (32, 160)):
        features = encoder(images(size))
        assert features.grid == (size[0] // encoder.stride, size[1] // encoder.stride)
        assert features.tokens.shape == (2, features.grid[0] * features.grid[1], encoder.dim)
        assert features.pooled.isfinite().all()


def test_gradients_reach_every_parameter(config: Any) -> None:
    encoder = make(config).train()
    features = encoder(images(), Mask(token=masks(quads=False, grid=(4, 4))))
    weights = torch.randn(features.tokens.shape, generator=torch.Generator().manual_seed(3))
    (features.tokens * weights).sum().backward()
    missing = [
        name for name, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    ]
    assert not missing


def test_layers_and_depths(config: Any) -> None:
    encoder = make(config)
    features = encoder(images(), layers=(-1, 0))
    torch.testing.assert_close(features.layers[0].tokens, features.tokens)
    assert features.layers[1].tokens.shape[1] > features.tokens.shape[1]
    numbers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert (min(numbers.values()), max(numbers.values())) == (0, encoder.depth + 1)
    for number, block in enumerate(encoder.blocks()):
        inside = {id(parameter) for parameter in block.parameters()}
        assert {numbers[name] for name, p in encoder.named_parameters() if id(p) in inside} == {number + 1}
    assert len(encoder.blocks()) == encoder.depth


def test_drop_path_rises_with_depth() -> None:
    for name, config in CONFIGS.items():
        rates = [
            part.drop_prob
            for part in build_encoder(type(config)(**{**vars(config), "drop_path": 0.2}), (64, 64)).modules()
            if type(part).__name__ == "DropPath"
        ]
        assert rates == sorted(rates), name
        assert rates[-1] == pytest.approx(0.2)


def test_one_channel() -> None:
    for config in CONFIGS.values():
        assert build_encoder(config, (64, 64), channels=1)(torch.zeros(1, 1, 64, 64)).pooled.shape[0] == 1


@pytest.mark.parametrize("window", [6, 7, 8, 16])
def test_swin_v2_windows_at_its_own_size(window: int) -> None:
    """Maps that are padded to whole windows and shifted are timm's where timm's own mask is right."""
    side = 4 * 2 * window  # two windows in the first stage, one in the second
    config = SwinConfig(version=2, dim=8, depths=(2, 2), heads=(1, 2), patch=4, window=window)
    encoder = make(config, (side, side))
    torch.testing.assert_close(
        encoder(images((side, side))).pooled, encoder.inner()(images((side, side))), rtol=0, atol=1e-6
    )


def test_swin_v2_on_a_small_map_is_the_one_built_for_it() -> None:
    """A map no larger than its window is one window of its own, neither filled up nor shifted.

    The small model's positions are told in shares of the large one's window, as for a pretrained window.
    """
    config = SwinConfig(version=2, dim=8, depths=(2, 2), heads=(1, 2), patch=2, window=4)
    encoder = make(config, (32, 32))
    small = SwinTransformerV2(
        img_size=8, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=0,
        pretrained_window_sizes=(4, 4),
    ).eval()  # fmt: skip
    assert [stage.blocks[1].window_size for stage in small.layers] == [(4, 4), (2, 2)]
    small.load_state_dict(encoder.inner().state_dict())
    torch.testing.assert_close(encoder(images((8, 8))).pooled, small(images((8, 8))))

    # the visible quarter of an image, moved together, is an image of that size
    dropped = torch.ones(2, 2, 2, dtype=torch.bool)
    dropped[:, 1, 0] = False
    whole = torch.zeros(2, 3, 16, 16)
    whole[:, :, 8:, :8] = images((8, 8))
    torch.testing.assert_close(encoder(whole, Mask(dropped)).pooled, small(images((8, 8))))


def test_swin_v2_masks_padding_and_borders() -> None:
    """On a map of 6x6 with windows of 4, the shifted blocks attend as if each region stood alone."""
    config = SwinConfig(version=2, dim=8, depths=(2,), heads=(2,), patch=2, window=4)
    encoder = make(config, (16, 16))
    block = encoder.blocks()[1]
    assert block.shift_size == (2, 2)
    cells = torch.randn(1, 6, 6, 8, generator=torch.Generator().manual_seed(0))
    given = block._attn(cells)
    # shifted by 2, windows of 4 begin at rows 2 and 6, so the regions are rows 2..5 and rows 0..1, likewise columns
    spans = [(2, 6), (0, 2)]
    for top, bottom in spans:
        for left, right in spans:
            region = cells[:, top:bottom, left:right]
            padded = torch.zeros(1, 4, 4, 8)
            # a region's tokens keep their offsets to each other, wherever in the window they stand
            padded[:, : bottom - top, : right - left] = region
            inside = torch.zeros(4, 4, dtype=torch.bool)
            inside[: bottom - top, : right - left] = True
            mask = torch.zeros(1, 16, 16).masked_fill(~inside.flatten()[None, None, :], -1e9)
            alone = block.attn(rearrange(padded, "b h w d -> b (h w) d"), mask=mask)
            alone = rearrange(alone, "b (h w) d -> b h w d", h=4)[:, : bottom - top, : right - left]
            torch.testing.assert_close(given[:, top:bottom, left:right], alone)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_distillation_token_is_deits(pool: Any) -> None:
    config = VitConfig(dim=32, depth=2, heads=2, patch=8, distillation_token=True, pool=pool)
    encoder = make(config, (32, 48))
    theirs = timm.create_model(
        "deit_base_distilled_patch16_224", img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2,
        num_classes=0,
    ).eval()  # fmt: skip
    theirs.load_state_dict(encoder.inner().state_dict())
    assert "dist_token" in theirs.state_dict()
    features = encoder(images((32, 48)))
    assert features.prefix_tokens is not None
    torch.testing.assert_close(
        torch.cat([features.prefix_tokens, features.tokens], dim=1), theirs.forward_features(images((32, 48)))
    )
    assert features.prefix_tokens.shape == (2, 2, 32)
    expected = theirs(images((32, 48))) if pool == "class" else features.tokens.mean(dim=1)
    torch.testing.assert_close(features.pooled, expected)
    few = encoder(images((32, 48)), Mask(masks(quads=False, grid=(4, 6))))
    assert few.prefix_tokens is not None
    assert (few.prefix_tokens.shape[1], few.tokens.shape[1]) == (2, 12)
    _, attention = class_token_attention(encoder, images((32, 48)))
    assert attention is not None
    assert attention.shape == (2, 2, 2 + 4 * 6)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: PvtV2Config(depths=(1, 1)), "depths .1, 1. names 2 stages"),
        (lambda: TwinsConfig(dims=(10, 20, 30, 40)), "stage 1 is 20 wide, which does not divide into 4 heads|stage 2"),
        (lambda: TwinsConfig(window=1), "greater than or equal to 2"),
    ],
)
def test_shapes_that_cannot_be(make_config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config()
