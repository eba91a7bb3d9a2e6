from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from pretrain.config import EncoderConfig
from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.attention_maps import _over, attention_pictures, class_token_attention, main_directions
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.vit.config import VitConfig

VIT = VitConfig(dim=32, depth=2, heads=2, patch=4, registers=1)
BEIT = {"dim": 32, "depth": 2, "heads": 2, "patch": 4}
SHARED, OWN = (BeitConfig(relative_positions=kind, **BEIT) for kind in ("shared", "per_block"))
SWIN = SwinConfig(dim=16, depths=(2, 2), heads=(1, 2), patch=2, window=4)


def make(config: EncoderConfig, size: tuple[int, int] = (16, 24)) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(config, size).eval()


def images(size: tuple[int, int] = (16, 24), count: int = 3) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def num_hooks(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("config", [VIT, SHARED, OWN], ids=["vit", "beit shared", "beit own"])
def test_attention_is_a_distribution_over_prefix_and_patches(config: EncoderConfig) -> None:
    encoder = make(config)
    features, attention = class_token_attention(encoder, images())
    assert attention is not None
    assert features.prefix_tokens is not None
    assert attention.shape == (3, 2, features.prefix_tokens.shape[1] + 4 * 6)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 2))
    with torch.no_grad():
        assert torch.equal(features.tokens, encoder(images()).tokens)
    assert num_hooks(encoder) == 0


def test_it_is_what_the_last_block_computes() -> None:
    """By hand, from the last block's input."""
    encoder = make(VIT)
    _, attention = class_token_attention(encoder, images())
    block, states = encoder.blocks()[-1], encoder(images(), layers=(0,)).layers[0].states
    qkv = rearrange(block.attn.qkv(block.norm1(states)), "b n (three h d) -> three b h n d", three=3, h=2)
    weights = (qkv[0] @ qkv[1].transpose(-2, -1) / 16**0.5).softmax(dim=-1)
    torch.testing.assert_close(attention, weights[:, :, 0])


def test_beits_relative_positions_count() -> None:
    encoder = make(OWN)
    _, before = class_token_attention(encoder, images())
    with torch.no_grad():
        encoder.blocks()[-1].attn.relative_position_bias_table.normal_(std=3.0)
    _, after = class_token_attention(encoder, images())
    assert not torch.allclose(before, after, atol=0.05)


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_blocks_are_seen_into(compiled: bool) -> None:
    encoder = make(VIT)
    if compiled:
        for block in encoder.blocks():
            block.compile(backend="eager")
        encoder(images())  # as training does before
    _, attention = class_token_attention(encoder, images())
    torch.testing.assert_close(attention, class_token_attention(make(VIT), images())[1])


def test_any_timm_vit_has_a_picture() -> None:
    config = TimmConfig(model="vit_tiny_patch16_224", args={"depth": 2})
    encoder = make(config, (32, 32))
    ((label, picture),) = attention_pictures(encoder, images((32, 32)), crops((32, 32)), lambda shown: shown).items()
    assert "class token" in label
    assert picture.shape == (3, 3, 32, 32 * (1 + 1 + 3))


def crops(size: tuple[int, int]) -> Tensor:
    return torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "config",
    [
        SWIN,
        PvtConfig(dims=(16, 32), depths=(1, 1), heads=(1, 2), mlp_ratios=(2, 2), sr=(2, 1), reduction="pool", patch=2),
    ],
    ids=["swin", "pvt"],
)
def test_pyramids_have_no_class_token_and_show_their_tokens(config: EncoderConfig) -> None:
    encoder = make(config, (16, 16))
    assert class_token_attention(encoder, images((16, 16)))[1] is None
    ((label, picture),) = attention_pictures(encoder, images((16, 16)), crops((16, 16)), lambda shown: shown).items()
    assert "three main directions" in label
    assert picture.shape == (3, 3, 16, 32)


def test_main_directions_tell_groups_of_tokens_apart() -> None:
    groups = torch.tensor([0, 1, 2, 3]).repeat(6)
    tokens = torch.eye(8)[groups] + 0.01 * torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    colours = main_directions(tokens.reshape(2, 12, 8)).reshape(24, 3)
    distances = torch.cdist(colours, colours)
    same = groups[:, None] == groups
    assert distances[same].max() < 0.2
    assert distances[~same].min() > 0.5


def test_main_directions_keep_their_sign_when_the_tokens_turn() -> None:
    tokens = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    guide = tokens[..., 0] + 0.1
    turned: Any = copy.deepcopy(-tokens)
    there, back = main_directions(tokens, guide), main_directions(turned, guide)
    # -tokens has the same directions; pointing along the guide, its picture is the same one
    torch.testing.assert_close(there, back, atol=1e-4, rtol=0)


def test_heat_lies_over_the_greyed_picture() -> None:
    shown = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    shown[:, 0] = 220  # red, which greying takes out: (220 + 100 + 100) / 3 = 140
    maps = torch.tensor([[[[0, 0], [255, 255]], [[85, 85], [0, 0]]]], dtype=torch.uint8)
    over = _over(shown, maps)
    assert over.shape == (1, 3, 2, 4)
    assert over[0, :, 0, 0].tolist() == [84, 84, 84], "no heat: the grey picture, darkened to .6"
    assert over[0, :, 1, 0].tolist() == [255, 255, 255], "the hottest patch is white"
    assert over[0, :, 0, 2].tolist() == [141, 56, 56], "a third of the heat: red, a third of 255, over grey"


def test_maps_over_pictures_that_are_not_rgb_stand_alone() -> None:
    maps = torch.tensor([[[[7, 9]]]], dtype=torch.uint8)
    assert _over(torch.zeros(1, 5, 1, 2, dtype=torch.uint8), maps)[0, :, 0].tolist() == [[7, 9]] * 5
