"""Rotary positions (Su et al. 2021) of patches on a map, as DINOv3 computes them (Simeoni et al. 2025, section 3).

A turn is cosines and sines of the angles of each token, (2, ..., n, e / 2) for heads of width e; prefix tokens have
none to turn by. Dropped tokens take their turns with them, so that each keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from data_pipelines.rng import Purpose
from pretrain.encoders import drop_path
from pretrain.encoders.native import Grids, Interleaved
from pretrain.encoders.packed import Groups, attend_packed
from pretrain.encoders.position_settings import RotaryPositions
from pretrain.encoders.tables import built_once
from pretrain.stream.from_host import from_host

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def periods(rotary: RotaryPositions, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(width / 4,) the periods of a head of `width`, of coordinates in -1 .. 1."""
    dtype = DTYPES[rotary.dtype]
    if rotary.periods is None:
        assert rotary.base is not None
        return rotary.base ** (2 * torch.arange(width // 4, device=device, dtype=dtype) / (width // 2))
    least, largest = rotary.periods
    share = torch.linspace(0, 1, width // 4, device=device, dtype=dtype)
    return (largest / least) ** share / (largest / least) * largest


def coordinates(rotary: RotaryPositions, grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(h * w, 2) row and column of the middle of each patch of a `grid`, in -1 .. 1."""
    dtype = DTYPES[rotary.dtype]
    whole = {"max": torch.sym_max, "min": torch.sym_min}.get(rotary.normalise)
    sides = grid if whole is None else (whole(*grid),) * 2
    rows, columns = (
        (torch.arange(side, device=device, dtype=torch.float32) + 0.5).to(dtype) / whole
        for side, whole in zip(grid, sides, strict=True)
    )
    both = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return 2.0 * rearrange(both, "h w c -> (h w) c") - 1.0


def turn_by(places: Tensor, lengths: Tensor) -> Tensor:
    """(2, ..., n, 2 k) the turns of places (..., n, 2), row and column, whose periods are `lengths` (k,)."""
    angles = 2 * math.pi * rearrange(places, "... n c -> ... n c 1") / lengths
    angles = rearrange(angles, "... n c k -> ... n (c k)")
    return torch.stack([angles.cos(), angles.sin()])


@built_once
def turn_of(
    rotary: RotaryPositions, grid: tuple[int, int], width: int, num_prefix: int, device: torch.device
) -> Tensor:
    """(2, p + n, width / 2) the turns of `num_prefix` tokens, which stay, and of a `grid` of patches."""
    return with_prefix(turn_by(coordinates(rotary, grid, device), periods(rotary, width, device)), num_prefix)


def with_prefix(turn: Tensor, num_prefix: int) -> Tensor:
    """A turn (2, ..., n, k) with that of prefix tokens, which is none, in front: (2, ..., p + n, k)."""
    still = torch.zeros_like(turn[..., :1, :]).expand(*turn.shape[:-2], num_prefix, -1).clone()
    still[0] = 1.0
    return torch.cat([still, turn], dim=-2)


def turns_of(
    rotary: RotaryPositions,
    grid: tuple[int, int],
    units: Tensor | None,
    width: int,
    num_prefix: int,
    blocks: int,
    device: torch.device,
    training: bool,
) -> list[Tensor]:
    """For each of the `blocks` the turn (2, 1 or b, p + n, width / 2) of a `grid`, or of its `units` (b, n).

    In `training` and within `drop_path.drawn`, coordinates are drawn as `rotary` says: a function of (seed, step, how
    many sizes of images came before, block).
    """
    drawn = drop_path.uniforms_of_the_step(Purpose.COORDINATES, blocks, 5) if training and rotary.varies else None
    if drawn is None:
        turn = chosen(turn_of(rotary, grid, width, num_prefix, device), units, num_prefix)
        return [turn] * blocks
    moved, factors = (from_host(part, device) for part in drawn_changes(rotary, drawn))
    places = coordinates(rotary, grid, device)
    places = (places + rearrange(moved, "m c -> m 1 c")) * rearrange(factors, "m c -> m 1 c")
    turns = turn_by(places.to(DTYPES[rotary.dtype]), periods(rotary, width, device))
    turns = with_prefix(turns, num_prefix)
    return [chosen(turns[:, block], units, num_prefix) for block in range(blocks)]


def native_turns(
    rotary: RotaryPositions,
    grids: Grids,
    kept: Tensor | None,
    packing: Interleaved,
    width: int,
    blocks: int,
    device: torch.device,
    training: bool,
) -> list[Tensor]:
    """For each of the `blocks` the turns (2, t, width / 2) of images at their own shape, each by its own `grid`, of all
    patches or of those `kept`; prefix tokens, where `packing` has them, are turned by nothing.

    What is drawn of coordinates in training is drawn once for all images of a pass; see `turns_of`.
    """
    drawn = drop_path.uniforms_of_the_step(Purpose.COORDINATES, blocks, 5) if training and rotary.varies else None
    if drawn is None:
        each = [torch.cat([turn_of(rotary, grid, width, 0, device) for grid in grids], dim=1)]
    else:
        moved, factors = (from_host(part, device) for part in drawn_changes(rotary, drawn))
        places = torch.cat([coordinates(rotary, grid, device) for grid in grids])
        places = (places + rearrange(moved, "m c -> m 1 c")) * rearrange(factors, "m c -> m 1 c")
        each = list(turn_by(places.to(DTYPES[rotary.dtype]), periods(rotary, width, device)).unbind(1))

    def joined(turn: Tensor) -> Tensor:
        turn = turn if kept is None else turn.index_select(1, kept)
        flat = rearrange(turn, "two t k -> t two k")
        still = flat.new_zeros(packing.num_prefix, *flat.shape[1:])
        still[:, 0] = 1.0
        return rearrange(packing.joined(still, flat), "t two k -> two t k")

    found = [joined(turn) for turn in each]
    return found if len(found) == blocks else found * blocks


def drawn_changes(rotary: RotaryPositions, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is added to coordinates (m, 2) and what then multiplies them (m, 2), from (m, 5) uniform in 0 .. 1."""
    moved = rotary.shift * (2 * drawn[:, :2] - 1)
    logarithms = math.log(rotary.jitter) * (2 * drawn[:, 2:4] - 1) + math.log(rotary.rescale) * (2 * drawn[:, 4:] - 1)
    return moved.astype(np.float32), np.exp(logarithms).astype(np.float32)


def chosen(turn: Tensor, units: Tensor | None, num_prefix: int) -> Tensor:
    """A map's turn (2, p + n, k) for all images, (2, 1, p + n, k), or of their `units` (b, m): (2, b, p + m, k)."""
    if units is None:
        return rearrange(turn, "two n k -> two 1 n k")
    prefix = repeat(turn[:, :num_prefix], "two p k -> two b p k", b=len(units))
    return torch.cat([prefix, turn[:, num_prefix:][:, units]], dim=2)


def packed_turns(parts: Sequence[Sequence[Tensor]], groups: Groups) -> list[Tensor]:
    """For each block the turns (2, t, k) of packed tokens, from those of each group's blocks (`turns_of`)."""
    joined: dict[tuple[int, ...], Tensor] = {}

    def joining(turns: Sequence[Tensor]) -> Tensor:
        key = tuple(map(id, turns))  # where nothing is drawn, all blocks share one
        if key not in joined:
            each = [turn.expand(-1, count, -1, -1) for turn, (count, _) in zip(turns, groups, strict=True)]
            joined[key] = torch.cat([rearrange(turn, "two b n k -> two (b n) k") for turn in each], dim=1)
        return joined[key]

    return [joining(turns) for turns in zip(*parts, strict=True)]


def attend_turned(qkv: Tensor, heads: int, turn: Tensor, groups: Groups | None = None) -> Tensor:
    """Attention of queries, keys and values side by side, (b, n, 3 d) with turns (2, 1 or b, n, k), or packed (t, 3 d)
    with turns (2, t, k) and their `groups`."""
    query, key, value = rearrange(qkv, "... (three h e) -> three ... h e", three=3, h=heads)
    query, key = turned(query, turn), turned(key, turn)
    if groups is not None:
        packed = rearrange(torch.stack([query, key, value]), "three t h e -> t (three h e)")
        return attend_packed(packed, heads, groups)
    query, key, value = (rearrange(part, "b n h e -> b h n e") for part in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(query, key, value), "b h n e -> b n (h e)")


def rows_of(turn: Tensor, rows: Tensor | None) -> Tensor:
    """The turn of some rows (images, or packed tokens) of a batch; of all where None."""
    return turn if rows is None or turn.shape[1] == 1 else turn.index_select(1, rows)


def turned(heads: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys (..., n, h, e) turned by (2, ..., n, e / 2): each number with the one half a head further."""
    cosines, sines = (rearrange(part, "... k -> ... 1 k") for part in turn)
    first, second = heads.to(turn.dtype).chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1).to(heads.dtype)
