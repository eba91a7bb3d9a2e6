"""The Focal Transformer: its attention key by key, its masks, its authors' checkpoints."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from test_import import imported
from torch import Tensor, nn

from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.focal.config import FocalConfig
from pretrain.encoders.focal.encoder import FocalBlock
from pretrain.encoders.saved import load_encoder

STAGES: dict[str, Any] = {"dim": 8, "depths": (1, 2, 1), "heads": (1, 2, 4), "patch": 4}
CONFIGS = {
    "two levels": FocalConfig(**STAGES, windows=(4, 4, 2), expand=(2, 1, 0), focal_windows=(5, 3, 1)),
    "three levels": FocalConfig(
        **STAGES, windows=(3, 3, 3), expand=(1, 2, 3), focal_windows=(3, 3, 3), levels=3, overlapping=True,
        layer_scale=0.5,
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> FocalConfig:
    return CONFIGS[request.param]


def make(config: FocalConfig, size: tuple[int, int] = (64, 64)) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(config, size, mask_token=True).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return encoder


def images(size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def slow_attention(block: FocalBlock, tokens: Tensor) -> Tensor:
    """What a block's attention makes of a map (h, w, d), each query against a list of its keys."""
    attention, w = block.attn, block.window
    size, e, f = tokens.shape[:2], attention.expand, attention.focal_window
    normed = F.pad(block.norm1(tokens), (0, 0, 0, -size[1] % w, 0, -size[0] % w))
    rows, columns, dim = normed.shape
    query, near_keys, near_values = attention.qkv(normed).split(dim, dim=-1)
    pooled = []
    for level, pool in enumerate(block.pool_layers):
        part, parts = w // 2**level, 2**level
        counts = (rows // w * parts, columns // w * parts)
        top, left = (rows - counts[0] * part) // 2, (columns - counts[1] * part) // 2
        cells = {}
        for y, x in product(range(counts[0]), range(counts[1])):
            inside = normed[top + y * part :, left + x * part :][:part, :part]
            short = (size[0] < w and top + y * part >= size[0]) or (size[1] < w and left + x * part >= size[1])
            if not short:  # a part of nothing but filling
                cell = (inside * pool.weight.view(part, part, 1)).sum(dim=(0, 1)) + pool.bias
                cells[y, x] = attention.qkv(cell).split(dim, dim=-1)[1:]
        pooled.append(cells)
    own, around = attention.relative_position_bias_table, e and attention.relative_position_bias_table_to_neighbors[0]
    out = []
    for row, column in product(range(size[0]), range(size[1])):
        top, left = row // w * w, column // w * w
        r, c = row - top, column - left
        seen: list[tuple[Tensor, Tensor, Tensor]] = []  # key, value, bias of each head
        for y, x in product(range(w), range(w)):
            if not (size[0] < w and y >= size[0]) and not (size[1] < w and x >= size[1]):
                offset = (r - y + w - 1) * (2 * w - 1) + c - x + w - 1
                seen.append((near_keys[top + y, left + x], near_values[top + y, left + x], own[offset]))
        if e and min(size) > w:
            number = 0
            for down, right in product((e, -e), (e, -e)):
                for y, x in product(range(down, w + down), range(right, w + right)):
                    if not (0 <= y < w and 0 <= x < w):  # around; over the borders
                        at = ((top + y) % rows, (left + x) % columns)
                        seen.append((near_keys[at], near_values[at], around[:, r * w + c, number]))
                        number += 1
            assert number == 4 * w**2 - 4 * (w - e) ** 2
        for level, cells in enumerate(pooled):
            side, table = f + 2**level - 1, attention.relative_position_bias_table_to_windows[level]
            for y, x in product(range(side), range(side)):
                at = (top // w * 2**level - f // 2 + y, left // w * 2**level - f // 2 + x)
                if at in cells:
                    offset = (r - y + side - 1) * (w + side - 1) + c - x + side - 1
                    seen.append((*cells[at], table[:, offset]))
        keys, values, biases = (torch.stack(part) for part in zip(*seen, strict=True))
        asks, keys, values = (rearrange(part, "... (n d) -> ... n d", n=attention.heads)
                              for part in (query[row, column], keys, values))  # fmt: skip
        scores = torch.einsum("n d, j n d -> j n", asks, keys) / math.sqrt(asks.shape[-1]) + biases
        out.append(torch.einsum("j n, j n d -> n d", scores.softmax(dim=0), values).flatten())
    out = torch.stack(out).view(*size, dim)
    return attention.proj(out)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 6), {"windows": (2,), "expand": (1,), "focal_windows": (3,)}),
        ((6, 6), {"windows": (3,), "expand": (2,), "focal_windows": (1,), "levels": 3}),  # quarters of 1, not 1.5
        ((3, 5), {"windows": (2,), "expand": (2,), "focal_windows": (3,)}),  # filled up to 4 x 6
        ((2, 7), {"windows": (4,), "expand": (1,), "focal_windows": (3,), "levels": 3}),  # lower than a window
        ((4, 4), {"windows": (2,), "expand": (0,), "focal_windows": (1,), "levels": 1}),
    ],
    ids=["two levels", "three levels", "filled", "low", "near only"],
)
def test_attention_is_the_papers(size: tuple[int, int], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = FocalBlock(FocalConfig(dim=4, depths=(1,), heads=(2,), **settings), 0, 0.0).double()
    inputs = [parameter for name, parameter in block.named_parameters() if "mlp" not in name and "norm2" not in name]
    for parameter in inputs:
        parameter.data += 0.3 * torch.randn(parameter.shape)
    tokens = torch.randn(1, *size, 4, dtype=torch.float64, requires_grad=True)
    fast, slow = block._attend(tokens)[0], slow_attention(block, tokens[0])
    torch.testing.assert_close(fast, slow)
    weights = torch.randn_like(slow)
    for own, other in zip(
        torch.autograd.grad((fast * weights).sum(), [tokens, *inputs], allow_unused=True),
        torch.autograd.grad((slow * weights).sum(), [tokens, *inputs], allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_published_sizes() -> None:
    # M parameters (the README of the authors' code), head included
    published: dict[tuple[Any, bool], float] = {("tiny", False): 28.9, ("tiny", True): 30.8, ("base", False): 89.8}
    for (size, overlapping), millions in published.items():
        with torch.device("meta"):
            encoder = build_encoder(FocalConfig(size=size, overlapping=overlapping), (224, 224))
        count = sum(parameter.numel() for parameter in encoder.parameters()) + encoder.dim * 1000 + 1000
        assert count / 1e6 == pytest.approx(millions, abs=0.1), size


def test_pooling_starts_as_the_mean() -> None:
    encoder = build_encoder(CONFIGS["two levels"], (64, 64))
    pool = encoder.blocks()[0].pool_layers[0]
    cells = torch.randn(1, 8, 4, 3)
    torch.testing.assert_close(pool(cells)[0, :, 0], torch.stack([part.mean(dim=(0, 1)) for part in cells[0].split(4)]))


def test_each_token_names_its_units() -> None:
    """With all cut that mixes tokens, what moves a token are the pixels of its own units."""
    encoder = make(CONFIGS["two levels"])
    for block in encoder.blocks():
        nn.init.zeros_(block.attn.proj.weight)
    hidden = torch.ones(2, 4, 4, dtype=torch.bool)
    hidden[:, 1::2, ::2] = False
    features = encoder(images(), Mask(drop=hidden))
    assert features.ids_keep is not None
    assert not hidden[0].flatten()[features.ids_keep[0].flatten()].any()
    for token, (unit,) in enumerate(features.ids_keep[0].tolist()):
        top, left = (16 * side for side in divmod(unit, 4))
        changed = images()
        changed[0, :, top : top + 16, left : left + 16] += torch.randn(3, 16, 16)
        moved = (encoder(changed, Mask(drop=hidden)).tokens[0] - features.tokens[0]).abs().sum(dim=-1)
        assert moved[token] > 0
        assert moved.sum() == moved[token]


def test_hidden_pixels_change_nothing(config: FocalConfig) -> None:
    """With embeddings that overlap too."""
    encoder = make(config)
    replaced = torch.zeros(2, 8, 8, dtype=torch.bool)
    replaced[0, 2:5, 3] = replaced[1, 7] = True
    pixels = replaced.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(pixels, images(seed=9), images())
    first, second = (encoder(seen, Mask(token=replaced)).tokens for seen in (images(), other))
    assert torch.equal(first, second)
    assert not torch.allclose(encoder(images()).tokens, encoder(other).tokens)


def test_local_crops_and_earlier_layers(config: FocalConfig) -> None:
    encoder = make(config)
    for size in ((64, 64), (32, 80), (16, 16)):
        features = encoder(images(size), layers=(-1, 0))
        assert features.grid == (size[0] // 16, size[1] // 16)
        torch.testing.assert_close(features.layers[0].tokens, features.tokens)
        assert features.layers[1].tokens.shape == (2, 16 * len(features.tokens[0]), 8)


def test_a_map_of_one_window_is_as_if_it_were_alone() -> None:
    """Shorter than a window, it does not see what fills the window up: neither do tokens of another image."""
    encoder = make(FocalConfig(**STAGES, windows=(7, 7, 7), expand=(3, 3, 3), focal_windows=(5, 3, 1)))
    first = encoder(images((16, 16)))
    cells = encoder.embed(images((16, 16)))  # 4 x 4 tokens in a window of 7
    block = encoder.blocks()[0].double()
    torch.testing.assert_close(block._attend(cells.double())[0], slow_attention(block, cells[0].double()))
    assert first.pooled.isfinite().all()


def test_layers_rise_from_the_embedding_to_the_norm(config: FocalConfig) -> None:
    encoder = make(config)
    layers = {name: encoder.layer_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert (min(layers.values()), max(layers.values())) == (0, encoder.depth + 1)
    found = [layers[f"focal.{name}"] for name in ("patch_embed.norm.weight", "layers.0.downsample.proj.weight")]
    assert [*found, layers["mask_token"]] == [0, 2, 0]
    for number, block in enumerate(encoder.blocks()):
        inside = {id(parameter) for parameter in block.parameters()}
        assert {layers[name] for name, p in encoder.named_parameters() if id(p) in inside} == {number + 1}
    exempt = [name for name in layers if encoder.no_decay(name)]
    assert len(exempt) == encoder.depth * config.levels + sum(
        depth for depth, expand in zip(config.depths, config.expand, strict=True) if expand
    )


def test_official_checkpoints_are_imported(config: FocalConfig, tmp_path: Path) -> None:
    encoder = make(config)
    others = {"head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    others["layers.0.blocks.0.attn.relative_position_index_0"] = torch.zeros(16, 25, dtype=torch.int64)
    others["layers.0.blocks.0.attn.valid_ind_rolled"] = torch.zeros(48, dtype=torch.int64)
    told = () if config.layer_scale is None else (f"layer_scale={config.layer_scale}",)
    found = imported({"model": dict(encoder.inner().state_dict()) | others}, "focal", tmp_path, *told, image_size=64)
    assert set(found.left) == set(others)
    assert found.encoder == config
    loaded, _ = load_encoder(tmp_path / "out")
    torch.testing.assert_close(loaded(images()).pooled, encoder(images()).pooled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": (7, 7)}, "differ in length"),
        ({"expand": (8, 3, 3, 0)}, "expand of stage 0 is 8; it is at most the window's 7 tokens"),
        ({"focal_windows": (7, 4, 3, 1)}, "focal_windows of stage 1 is 4"),
        ({"levels": 5}, "windows of 7 tokens don't divide so often"),
        ({"heads": (3, 6, 12, 25)}, "stage 3 is 768 wide, which does not divide into 25 heads"),
        ({"overlapping": True, "patch": 8}, "set patch=4"),
    ],
)
def test_shapes_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FocalConfig(**settings)
