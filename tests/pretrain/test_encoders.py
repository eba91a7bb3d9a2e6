from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from data_pipelines.rng import Stream
from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.base import Mask, refine
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.swin.windows import window_mask
from pretrain.encoders.vit.config import VitConfig
from pretrain.stream.masking import one_in_2x2, random_units

VIT = VitConfig(dim=32, depth=2, heads=2, patch=4)
SWIN = SwinConfig(dim=16, depths=(2, 2), heads=(1, 2), patch=2, window=4)


def make(config: VitConfig | SwinConfig, size: tuple[int, int] = (32, 32)) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(config, size, mask_token=True).eval()


def images(size: tuple[int, int] = (32, 32), seed: int = 0, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def masks(kind: str, grid: tuple[int, int], count: int = 3) -> Tensor:
    rngs = [Stream(seed) for seed in range(count)]
    drawn = [
        one_in_2x2(rng, grid) if kind == "quads" else random_units(rng, grid, grid[0] * grid[1] // 2) for rng in rngs
    ]
    return torch.from_numpy(np.stack(drawn))


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("unit", [4, 8])
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (VIT, "random"),
        (VIT, "quads"),
        (VitConfig(dim=32, depth=2, heads=2, patch=4, stem="conv"), "random"),
        (SWIN, "quads"),
    ],
)
def test_dropped_pixels_change_nothing(config: Any, kind: str, unit: int, size: tuple[int, int]) -> None:
    encoder = make(config, size)
    grid = (size[0] // unit, size[1] // unit)
    dropped = masks(kind, grid)
    seen, hidden = images(size, 0), rearrange(refine(dropped, size), "b h w -> b 1 h w")
    first = encoder(seen, Mask(dropped))
    second = encoder(torch.where(hidden, images(size, 1), seen), Mask(dropped))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pooled, second.pooled)
    shown = encoder(torch.where(hidden, seen, images(size, 1)), Mask(dropped))
    assert not torch.allclose(first.tokens, shown.tokens)


@pytest.mark.parametrize("config", [VIT, VitConfig(dim=32, depth=2, heads=2, patch=4, stem="conv"), SWIN])
def test_replaced_pixels_change_nothing(config: Any) -> None:
    encoder = make(config)
    replaced = masks("random", (8, 8))
    hidden = rearrange(refine(replaced, (32, 32)), "b h w -> b 1 h w")
    first = encoder(images(), Mask(token=replaced))
    second = encoder(torch.where(hidden, images(seed=1), images()), Mask(token=replaced))
    assert torch.equal(first.tokens, second.tokens)
    assert first.grid == (32 // encoder.stride, 32 // encoder.stride)


@pytest.mark.parametrize("unit", [4, 8])
@pytest.mark.parametrize(("config", "kind"), [(VIT, "random"), (SWIN, "quads")])
def test_each_token_names_the_units_it_stands_for(config: Any, kind: str, unit: int) -> None:
    """The units of all tokens together are the visible ones, and a change in one unit reaches its own token.

    A ViT without attention, or a Swin whose windows hold one token, would change that token only; here the token
    that changes most is asked for.
    """
    encoder = make(config)
    dropped = masks(kind, (32 // unit, 32 // unit))
    fine = min(unit, encoder.stride)
    visible = ~refine(dropped, (32 // fine, 32 // fine))
    units = encoder(images(), Mask(dropped)).ids_keep
    assert units is not None
    for row, seen in zip(units, visible, strict=True):
        assert sorted(row.flatten().tolist()) == seen.flatten().nonzero().flatten().tolist()

    token = units.shape[1] // 2
    for block in encoder.blocks():  # no mixing between tokens: what changes is the token of the changed unit
        block.attn.proj.weight.data.zero_()
    before = encoder(images(), Mask(dropped)).tokens[0]
    for unit_index in units[0, token].tolist():
        top, left = (side * fine for side in divmod(unit_index, 32 // fine))
        changed = images()
        changed[0, :, top : top + fine, left : left + fine] += 1.0
        difference = (encoder(changed, Mask(dropped)).tokens[0] - before).abs().sum(dim=-1)
        assert difference[token] > 0
        assert difference.sum() == difference[token]


def test_positions_belong_to_their_patches() -> None:
    """Dropping the same units from two encoders, one shown all and one shown few, gives each token its own position."""
    encoder = make(VIT)
    for block in encoder.blocks():
        block.attn.proj.weight.data.zero_()
    dropped = masks("random", (8, 8))
    whole, few = encoder(images()), encoder(images(), Mask(dropped))
    assert few.ids_keep is not None
    chosen = whole.tokens.gather(1, few.ids_keep.expand(-1, -1, encoder.dim))
    torch.testing.assert_close(few.tokens, chosen)


@pytest.mark.parametrize("config", [VIT, SWIN, VitConfig(dim=32, depth=2, heads=2, patch=4, registers=2)])
def test_local_crops_and_other_shapes_run(config: Any) -> None:
    encoder = make(config)
    for size in ((16, 16), (32, 64), (8, 24)):
        features = encoder(images(size))
        assert features.grid == (size[0] // encoder.stride, size[1] // encoder.stride)
        assert features.tokens.shape == (3, features.grid[0] * features.grid[1], encoder.dim)
        assert features.pooled.shape == (3, encoder.dim)


def test_simple_vit_has_no_prefix_and_pools_the_mean() -> None:
    config = VitConfig(dim=32, depth=2, heads=2, patch=4, class_token=False, pool="mean", positions="sincos")
    encoder = make(config)
    features = encoder(images())
    assert features.prefix_tokens is None
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))
    assert not encoder.vit.pos_embed.requires_grad


def test_layers_are_the_blocks_asked_for() -> None:
    for config in (VIT, SWIN):
        encoder = make(config)
        features = encoder(images(), layers=(-1, 0))
        torch.testing.assert_close(features.layers[0].tokens, features.tokens)
        assert not torch.equal(features.layers[1].pooled.sum(), features.pooled.sum())


def test_swin_is_timms_at_its_own_size() -> None:
    timm_model = SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=0
    ).eval()
    encoder = make(SWIN)
    timm_model.load_state_dict(encoder.swin.state_dict())
    torch.testing.assert_close(encoder(images()).pooled, timm_model(images()), rtol=0, atol=3e-6)


def test_swin_on_a_small_map_is_the_swin_built_for_it() -> None:
    """A map smaller than its window: filling tokens must not be attended to, and nothing is shifted."""
    encoder = make(SWIN)
    built_small = SwinTransformer(
        img_size=8, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=0
    ).eval()
    assert [stage.blocks[0].window_size for stage in built_small.layers] == [(4, 4), (2, 2)]
    state = encoder.swin.state_dict()
    for name, value in state.items():
        if name.endswith("relative_position_bias_table") and "layers.1" in name:
            # the 3x3 offsets of a 2x2 window lie in the middle of the 7x7 offsets of a 4x4 window
            table = rearrange(value, "(h w) heads -> h w heads", h=7)[2:5, 2:5]
            state[name] = rearrange(table, "h w heads -> (h w) heads")
    built_small.load_state_dict(state)
    torch.testing.assert_close(encoder(images((8, 8))).pooled, built_small(images((8, 8))))


def test_window_mask_separates_wrapped_and_filling_tokens() -> None:
    mask = window_mask((6, 4), (8, 4), (4, 4), (2, 0), torch.device("cpu"))
    assert mask.shape == (2, 16, 16)
    assert (mask[0] == 0).all()  # rows 0 to 3 are neighbours
    # of the second window, rows 4 and 5 came from the other border, 6 and 7 are filling
    second = rearrange(mask[1], "(h w) (i j) -> h w i j", h=4, i=4)
    together = second[:, 0, :, 0] == 0
    assert together.tolist() == [[i // 2 == j // 2 for j in range(4)] for i in range(4)]


def test_layer_numbers_rise_from_the_embedding_to_the_norm() -> None:
    for config in (VIT, SWIN):
        encoder = make(config)
        layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
        assert min(layers.values()) == 0
        assert max(layers.values()) == encoder.depth + 1
        for number, block in enumerate(encoder.blocks()):
            inside = {id(parameter) for parameter in block.parameters()}
            own = [layers[name] for name, parameter in encoder.named_parameters() if id(parameter) in inside]
            assert set(own) == {number + 1}


def test_swin_shifts_on_larger_images_than_it_was_built_for() -> None:
    """timm fixes the shift for the size it is built for; a last stage of one window would never be shifted again."""
    encoder, larger = make(SWIN), images((64, 64))
    built_large = SwinTransformer(
        img_size=64, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=0
    ).eval()
    small = SwinTransformer(
        img_size=8, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=0
    )
    assert [block.shift_size for block in small.layers[0].blocks] == [(0, 0), (0, 0)]
    built_large.load_state_dict(encoder.swin.state_dict())
    torch.manual_seed(0)
    one_window = build_encoder(SWIN, (16, 16)).eval()  # its last stage is one window of 4x4 tokens
    assert [block.shift_size for block in one_window.swin.layers[1].blocks] == [(0, 0), (0, 0)]
    one_window.swin.load_state_dict(encoder.swin.state_dict())
    torch.testing.assert_close(one_window(larger).pooled, built_large(larger))
