"""Where the tokens of a pass lie, for attention that reads positions: rotary, relative ones, those of a convolution.

A block takes a `Place` as an input. Images that drop a branch and units that are left out take theirs with them, so
that every token keeps its own position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from pretrain.encoders import rotary
from pretrain.encoders.attention import attend
from pretrain.encoders.packed import Groups, in_groups


class Spot(NamedTuple):
    """Images of one size: the `grid` (h, w) of their patches, and which (b, n) are left of it; None: all."""

    grid: tuple[int, int]
    units: Tensor | None


class Place(NamedTuple):
    """Where tokens lie: `num_prefix` of each image nowhere, then its patches.

    spots: of a batch one, of packed tokens one for each of their `groups`. turn: see `rotary.py`.
    """

    num_prefix: int
    spots: tuple[Spot, ...]
    groups: Groups | None = None
    turn: Tensor | None = None

    def left(self, rows: Tensor | None, groups: Groups | None) -> tuple[Spot, ...]:
        """The spots of the rows that go through a branch: of images, or of packed tokens, whose `groups` are left."""
        if rows is None or all(spot.units is None for spot in self.spots):
            return self.spots
        if groups is None:
            return (_of_images(self.spots[0], rows),)
        assert self.groups is not None
        found, first, start = [], 0, 0  # of the group among the rows, and among all tokens
        for spot, (count, length), (all_images, _) in zip(self.spots, groups, self.groups, strict=True):
            images = (rows[first : first + count * length : length] - start) // length
            found.append(_of_images(spot, images))
            first, start = first + count * length, start + all_images * length
        return tuple(found)


def _of_images(spot: Spot, images: Tensor) -> Spot:
    return spot if spot.units is None else Spot(spot.grid, spot.units.index_select(0, images))


class Relative(Protocol):
    """Positions between tokens, of one block."""

    def bias(self, query: Tensor, spot: Spot, num_prefix: int) -> Tensor:
        """What is added to the scaled products of queries (b, h, n, e) and keys: (1 or b, h, n, n)."""
        ...


def attend_at(
    place: Place,
    qkv: Tensor,
    heads: int,
    relative: Relative | None,
    rows: Tensor | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """Attention of queries, keys and values side by side, (b, n, 3 d) or packed (t, 3 d), that knows their place.

    rows: which of the place's images, or packed tokens, these are; all where None. groups: theirs, where packed.
    """
    if place.turn is not None:
        return rotary.attend_turned(qkv, heads, rotary.rows_of(place.turn, rows), groups)
    assert relative is not None
    spots = place.left(rows, groups)
    parts = [qkv] if groups is None else in_groups(qkv, groups)
    attended = []
    for part, spot in zip(parts, spots, strict=True):
        query, key, value = rearrange(part, "b n (three h e) -> three b h n e", three=3, h=heads)
        mixed = attend(query, key, value, relative.bias(query, spot, place.num_prefix))
        attended.append(rearrange(mixed, "b h n e -> b n (h e)"))
    if groups is None:
        return attended[0]
    return torch.cat([rearrange(part, "b n d -> (b n) d") for part in attended])


class ConditionalPositions(nn.Module):
    """Positions by a depth-wise convolution over the map of patches (Chu et al. 2021, CPVT): how far the borders are.

    Patches that are left out are zeros to their neighbours, whatever they show.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, place: Place) -> Tensor:
        """Tokens (b, p + n, d), or packed (t, d), to themselves with positions added to the patches."""
        if place.groups is None:
            return self._on_map(tokens, place.spots[0], place.num_prefix)
        parts: Sequence[Tensor] = in_groups(tokens, place.groups)
        added = [self._on_map(part, spot, place.num_prefix) for part, spot in zip(parts, place.spots, strict=True)]
        return torch.cat([rearrange(part, "b n d -> (b n) d") for part in added])

    def _on_map(self, tokens: Tensor, spot: Spot, num_prefix: int) -> Tensor:
        patches, (height, width) = tokens[:, num_prefix:], spot.grid
        cells, index = patches, None
        if spot.units is not None:
            index = repeat(spot.units, "b n -> b n d", d=patches.shape[-1])
            cells = patches.new_zeros(len(patches), height * width, patches.shape[-1]).scatter(1, index, patches)
        around = self.proj(rearrange(cells, "b (h w) d -> b d h w", h=height))
        around = rearrange(around, "b d h w -> b (h w) d")
        if index is not None:
            around = around.gather(1, index)
        return torch.cat([tokens[:, :num_prefix], patches + around.to(patches.dtype)], dim=1)
