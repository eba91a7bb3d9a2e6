"""Stand-alone local self-attention: the paper's layer and its stem in loops, published sizes, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.local_attention.config import LocalAttentionConfig
from pretrain.encoders.local_attention.encoder import LocalAttentionEncoder
from pretrain.encoders.local_attention.neighbourhood import AttentionStem, NeighbourAttention, attend_to_neighbours
from pretrain.encoders.local_attention.whole_map import MapAttention
from pretrain.encoders.places import Spot
from pretrain.encoders.relative import AbsolutePlaces
from pretrain.encoders.transfer import fit

SMALL: dict[str, Any] = {"dim": 8, "depths": (1, 2), "heads": 2, "kernel": 3}


def make(size: tuple[int, int] = (32, 32), **settings: Any) -> LocalAttentionEncoder:
    torch.manual_seed(0)
    return build_encoder(LocalAttentionConfig(**{**SMALL, **settings}), size, mask_token=True).eval()


def images(size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def slow_neighbours(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cell by cell: a key beyond the map is its place alone, and has no value."""
    batch, heads, dim, height, width = query.shape
    kernel = rows.shape[-1]
    out = []
    for y in range(height):
        for x in range(width):
            logits, values = [], []
            for a in range(kernel):
                for b in range(kernel):
                    row, column = y + a - kernel // 2, x + b - kernel // 2
                    inside = 0 <= row < height and 0 <= column < width
                    k = key[..., row, column] if inside else query.new_zeros(batch, heads, dim)
                    v = value[..., row, column] if inside else query.new_zeros(batch, heads, dim)
                    logits.append((query[..., y, x] * (k + rows[..., a] + columns[..., b])).sum(dim=-1))
                    values.append(v)
            weights = torch.stack(logits, dim=-1).softmax(dim=-1)
            out.append((weights.unsqueeze(-2) * torch.stack(values, dim=-1)).sum(dim=-1))
    return torch.stack(out, dim=-1).unflatten(-1, (height, width))


@pytest.mark.parametrize(("kernel", "size", "tables"), [(3, (5, 4), 1), (4, (3, 6), 2), (7, (4, 2), 1)])
def test_neighbours_are_attended_to_as_in_the_paper(kernel: int, size: tuple[int, int], tables: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 4, *size)] * 3 + [(tables, 4, kernel)] * 2
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    found, expected = attend_to_neighbours(*inputs), slow_neighbours(*inputs)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((mixed * weights).sum(), inputs) for mixed in (found, expected)]
    for own, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(own, slow)
    with torch.no_grad():
        torch.testing.assert_close(attend_to_neighbours(*inputs), expected)  # by the fused kernel


def test_half_of_a_heads_channels_know_rows_and_half_columns() -> None:
    torch.manual_seed(0)
    layer, cells = NeighbourAttention(8, 2, 3), torch.randn(2, 8, 4, 5)
    query, key, value = (part.unflatten(1, (2, 4)) for part in layer.qkv(cells).chunk(3, dim=1))
    nothing = torch.zeros(2, 3)
    rows, columns = torch.cat([layer.rows, nothing])[None], torch.cat([nothing, layer.columns])[None]
    expected = slow_neighbours(query, key, value, rows, columns).flatten(1, 2)
    torch.testing.assert_close(layer(cells), expected)


def test_the_stem_mixes_values_by_their_place_in_the_block() -> None:
    torch.manual_seed(0)
    stem, pixels = AttentionStem(3, 8, 2, 3), torch.randn(1, 3, 8, 12)
    parts = stem.proj(pixels)[0].unflatten(0, (5, 2, 4))  # queries, keys, three values; heads; channels
    mixed = torch.zeros(2, 4, 8, 12)
    for top in (0, 4):
        for left in (0, 4, 8):
            block = parts[..., top : top + 4, left : left + 4]
            value = torch.zeros(2, 4, 4, 4)
            for y in range(4):
                for x in range(4):
                    share = torch.stack([stem.rows[y] @ m + stem.columns[x] @ m for m in stem.mix]).softmax(dim=0)
                    value[..., y, x] = sum(share[m] * block[2 + m, ..., y, x] for m in range(3))
            query, key, value = (part.flatten(2) for part in (block[0], block[1], value))
            weights = (query.mT @ key).softmax(dim=-1)
            mixed[:, :, top : top + 4, left : left + 4] = (value @ weights.mT).unflatten(-1, (4, 4))
    expected = stem.norm(mixed.flatten(0, 1)[None]).relu()
    expected = torch.stack([expected[..., t : t + 4, x : x + 4].amax((2, 3)) for t in (0, 4) for x in (0, 4, 8)], -1)
    torch.testing.assert_close(stem(pixels), expected.unflatten(-1, (2, 3)))


@pytest.mark.parametrize("places", ["relative", "absolute"])
@torch.no_grad()
def test_whole_maps_are_attended_to_pair_by_pair(places: str) -> None:
    torch.manual_seed(0)
    layer, cells = MapAttention(5, 2, 4, (3, 2), places, out=6), torch.randn(1, 5, 3, 2)  # type: ignore[arg-type]
    query, key, value = layer.qkv(cells)[0].flatten(1).split(layer.widths)
    expected = torch.zeros(6, 6)  # channels, cells
    for head in range(2):
        own, keys, values = query.chunk(2)[head], key.chunk(2)[head], value.chunk(2)[head]
        for q in range(6):
            logits = torch.zeros(6)
            for k in range(6):
                if places == "relative":
                    down, right = k // 2 - q // 2, k % 2 - q % 2
                    place = layer.places.relative_rows[down + 2] + layer.places.relative_columns[right + 1]
                else:
                    place = layer.places.rows[k // 2] + layer.places.columns[k % 2]
                logits[k] = own[:, q] @ (keys[:, k] + place) / 2
            expected[3 * head : 3 * head + 3, q] = values @ logits.softmax(dim=0)
    torch.testing.assert_close(layer(cells)[0].flatten(1), expected)


@torch.no_grad()
def test_absolute_places_of_units_that_are_left() -> None:
    torch.manual_seed(0)
    places, units = AbsolutePlaces(4, (2, 3)), torch.tensor([[0, 4], [5, 1]])
    query = torch.randn(2, 2, 1 + 6, 4)
    whole = places.bias(query, Spot((2, 3), None), 1)
    for image in range(2):
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), units[image] + 1])
        few = places.bias(query[:, :, kept], Spot((2, 3), units), 1)
        torch.testing.assert_close(few[image], whole[image][:, kept][:, :, kept])


def test_tables_of_places_come_along_to_other_sizes() -> None:
    for places, rows in (("relative", (7, 3)), ("absolute", (4, 2))):  # before the last stage halves the sides
        settings: dict[str, Any] = {"attention": "botnet", "stem": "conv", "places": places}
        small, large = make((16, 8), **settings), make((32, 16), **settings)
        tables = [name for name in small.inner().state_dict() if ".places." in name]
        assert [len(small.inner().state_dict()[name]) for name in tables[:2]] == list(rows)
        fitted = fit(small.inner().state_dict(), large, old_grid=(4, 2))
        assert not fitted.left
        assert not fitted.fresh
        assert set(tables) == set(fitted.resized)
        large.inner().load_state_dict(fitted.weights)
        assert large(images((16, 8))).pooled.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"stem": "conv"}, {"attention": "botnet"}])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_hidden_pixels_change_nothing(settings: dict[str, Any], size: tuple[int, int]) -> None:
    encoder = make(size, **settings)
    hidden = torch.ones(2, size[0] // 8, size[1] // 8, dtype=torch.bool)
    hidden[:, ::2, 1::2] = False  # one visible unit in every 2x2
    pixels = hidden.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    other = torch.where(pixels, images(size, seed=9), images(size))
    for mask in (Mask(drop=hidden), Mask(token=hidden)):
        features = encoder(images(size), mask)
        assert torch.equal(features.tokens, encoder(other, mask).tokens)
    assert encoder(images((16, 48)), layers=(0, -1)).layers[1].grid == (2, 6)


def test_published_sizes() -> None:
    """Parameters in M, table 1 of the paper, classifier included: of the networks with a stem of convolutions; and
    BoTNet-50's (Srinivas et al. 2021)."""
    botnet: dict[str, Any] = {"attention": "botnet", "heads": 4}
    for size, millions, settings in ((26, 10.3, {}), (38, 14.1, {}), (50, 18.0, {}), (50, 20.8, botnet)):
        with torch.device("meta"):
            encoder = LocalAttentionEncoder(LocalAttentionConfig(size=size, stem="conv", **settings), (224, 224))  # type: ignore[arg-type]
        count = sum(parameter.numel() for parameter in encoder.parameters()) + encoder.dim * 1000 + 1000
        assert count / 1e6 == pytest.approx(millions, abs=0.3)


def test_layers_and_settings() -> None:
    encoder = make()
    layers = {name: encoder.layer_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert layers["mask_token"] == layers["net.stem.proj.weight"] == 0
    assert layers["net.stages.1.1.attn.rows"] == 3 == encoder.depth
    assert encoder.stage_ends() == (0, 2)
    with pytest.raises(ValueError, match="dim 8 does not divide into 8 heads of an even width"):
        LocalAttentionConfig(dim=8)
