"""PVT v1, UM-MAE's PVT and UM-MAE's Swin: slow loops from the papers, compact maps, positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipelines.rng import Stream
from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.compact import Compact
from pretrain.encoders.pvt.blocks import ReducedAttention
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.pvt.encoder import PvtEncoder
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig
from pretrain.encoders.um_mae_swin.encoder import CoordinateAttention
from pretrain.stream.masking import one_in_2x2

STAGES: dict[str, Any] = {"dims": (8, 16, 24), "depths": (1, 2, 1), "heads": (1, 2, 4), "mlp_ratios": (2, 2, 2)}
CONFIGS = {
    "conv": PvtConfig(**STAGES, sr=(4, 2, 1), patch=4),
    "pool": PvtConfig(**STAGES, sr=(4, 2, 1), patch=4, reduction="pool"),
    "um_mae_swin": UmMaeSwinConfig(dim=8, depths=(2, 2, 2), heads=(1, 2, 4), patch=4, window=2),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]


def make(config: Any, size: tuple[int, int] = (64, 64)) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(config, size, mask_token=True).eval()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad and "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return encoder


def images(size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def dropped(grid: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.stack([one_in_2x2(Stream(seed), grid) for seed in range(2)]))


def test_attention_with_a_reduced_map_is_the_papers() -> None:
    """PVT, equations 1 to 3, in loops: every cell of sr x sr tokens is one key, by a linear layer and a norm."""
    torch.manual_seed(0)
    attention = ReducedAttention(6, 2, 2, pooled=False).eval()
    tokens = torch.randn(1, 16, 6)
    grid = tokens[0].view(4, 4, 6)
    keys = []
    for row in (0, 2):
        for column in (0, 2):
            cell = sum(attention.sr.weight[:, :, y, x] @ grid[row + y, column + x] for y in range(2) for x in range(2))
            keys.append(attention.norm(cell + attention.sr.bias))
    source = torch.stack(keys)
    key, value = attention.kv(source).chunk(2, dim=-1)
    query = attention.q(tokens[0])
    out = torch.zeros(16, 6)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        weights = (query[:, part] @ key[:, part].T / math.sqrt(3)).softmax(dim=-1)
        out[:, part] = weights @ value[:, part]
    torch.testing.assert_close(attention(tokens, (4, 4), 1)[0], attention.proj(out))


def test_official_names_are_there() -> None:
    with torch.device("meta"):
        state = PvtEncoder(PvtConfig(), (224, 224)).pvt.state_dict()
    keys = {name: tuple(value.shape) for name, value in state.items()}
    assert keys["pos_embed1"] == (1, 3136, 64)
    assert keys["pos_embed4"] == (1, 50, 512)
    assert keys["cls_token"] == (1, 1, 512)
    assert keys["block3.5.attn.sr.weight"] == (320, 320, 2, 2)
    assert keys["block1.0.mlp.fc1.weight"] == (512, 64)
    assert keys["patch_embed2.norm.weight"] == (128,)
    assert "block4.0.attn.sr.weight" not in keys
    published = {"tiny": 13.2, "small": 24.5, "medium": 44.2, "large": 61.4}  # M parameters (table 2), head included
    for size, millions in published.items():
        with torch.device("meta"):
            encoder = PvtEncoder(PvtConfig(size=size), (224, 224))  # type: ignore[arg-type]
        count = sum(parameter.numel() for parameter in encoder.parameters()) + 512 * 1000 + 1000
        assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_hidden_pixels_change_nothing(config: Any, size: tuple[int, int]) -> None:
    encoder = make(config, size)
    grid = (size[0] // 8, size[1] // 8)
    hidden = dropped(grid)
    replaced = ~hidden & (torch.rand(hidden.shape, generator=torch.Generator().manual_seed(3)) < 0.3)
    for mask, unseen in (
        (Mask(drop=hidden), hidden),
        (Mask(drop=hidden, token=replaced), hidden | replaced),
        (Mask(token=hidden), hidden),
    ):
        pixels = unseen.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
        other = torch.where(pixels, images(size, seed=9), images(size))
        assert torch.equal(encoder(images(size), mask).tokens, encoder(other, mask).tokens)


def test_every_token_carries_its_units(config: Any) -> None:
    """A pixel of a visible unit moves its own token most directly: cut everything between tokens and look."""
    hidden = dropped((8, 8))
    compact = Compact(Mask(drop=hidden), (64, 64))
    raster = torch.arange(64.0).view(1, 8, 8, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)  # a pixel's unit
    moved = compact.move(raster)[..., 0]
    units = make(config)(images(), Mask(drop=hidden)).ids_keep
    assert units is not None
    assert units.shape == (2, 4, 4)  # 32 px of compact image, 16-px tokens: 4 units each
    for image in range(2):
        for token in range(4):
            row, column = divmod(token, 2)
            seen = moved[image, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].unique()
            assert sorted(units[image, token].tolist()) == sorted(int(unit) for unit in seen)
        assert not hidden[image].flatten()[units[image].flatten()].any()


def test_positions_go_where_their_units_go() -> None:
    hidden = dropped((4, 4))
    compact = Compact(Mask(drop=hidden), (64, 64))
    fine = torch.arange(64.0).view(1, 8, 8, 1)  # tokens of 8 px, units of 16
    moved = compact.positions(fine)
    for image in range(2):
        for row in range(2):
            for column in range(2):
                (unit,) = [(y, x) for y in (0, 1) for x in (0, 1) if not hidden[image, 2 * row + y, 2 * column + x]]
                top, left = 2 * (2 * row + unit[0]), 2 * (2 * column + unit[1])
                expected = fine[0, top : top + 2, left : left + 2]
                assert torch.equal(moved[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], expected)
    coarse = torch.tensor([[10.0, 20.0], [30.0, 40.0]]).view(1, 2, 2, 1)  # tokens of 32 px: a quad of units each
    assert compact.positions(coarse).flatten().tolist() == [25.0, 25.0]  # one token stands for all four


def test_pool_halves_its_cells_on_a_compact_map() -> None:
    """So keys are as many as on the whole image a quarter its size: the weights see the same statistics."""
    encoder = make(CONFIGS["pool"])
    seen: list[tuple[int, int]] = []
    first = encoder.blocks()[0]
    first.attn.norm.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[1:])))
    encoder(images())
    encoder(images(), Mask(drop=dropped((8, 8))))
    assert seen == [(16, 8), (16, 8)]  # 16x16 tokens by 4x4 cells; 8x8 tokens by 2x2


def test_other_sizes_and_earlier_layers(config: Any) -> None:
    encoder = make(config)
    features = encoder(images((32, 48)), layers=(-1, 0))
    assert features.grid == (2, 3)
    torch.testing.assert_close(features.layers[0].tokens, features.tokens)
    if config is CONFIGS["conv"]:
        torch.testing.assert_close(features.pooled, features.prefix_tokens[:, 0])


def test_coordinates_bias_the_attention_by_log_offsets() -> None:
    torch.manual_seed(0)
    attention = CoordinateAttention(4, 2, 8).eval()
    nn.init.zeros_(attention.qkv.weight[:8])  # no content: only positions decide
    nn.init.zeros_(attention.qkv.bias[:8])
    tokens, positions = torch.randn(1, 3, 4), torch.tensor([[[0.0, 0.0], [0.0, 3.0], [5.0, 1.0]]])
    weights = torch.zeros(2, 3, 3)
    for i in range(3):
        for j in range(3):
            offset = positions[0, j] - positions[0, i]
            spaced = torch.tensor([math.copysign(math.log1p(abs(float(d))), float(d)) for d in offset])
            weights[:, i, j] = attention.posmlp(spaced.view(1, 2, 1, 1)).flatten()
    value = attention.qkv(tokens)[0, :, 8:].view(3, 2, 2)
    mixed = torch.einsum("h i j, j h d -> i h d", weights.softmax(dim=-1), value).reshape(3, 4)
    torch.testing.assert_close(attention(tokens, positions, None)[0], attention.proj(mixed))


def test_replaced_units_of_um_mae_swin_pass_the_norm() -> None:
    encoder = make(CONFIGS["um_mae_swin"])
    norm = encoder.inner().patch_embed.norm
    torch.testing.assert_close(encoder.replacement(), norm(encoder.mask_token))


def test_layers_rise_from_the_embedding_to_the_norm(config: Any) -> None:
    encoder = make(config)
    layers = {name: encoder.layer_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert min(layers.values()) == 0
    assert max(layers.values()) == encoder.depth + 1
    assert layers["mask_token"] == 0
    for number, block in enumerate(encoder.blocks()):
        inside = {id(parameter) for parameter in block.parameters()}
        own = {layers[name] for name, parameter in encoder.named_parameters() if id(parameter) in inside}
        assert own == {number + 1}
