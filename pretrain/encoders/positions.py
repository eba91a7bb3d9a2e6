"""Learned positions brought from one grid of patches to another."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Interpolation = Literal["offset", "bicubic", "antialias"]


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], how: Interpolation = "offset"
) -> Tensor:
    """Positions (1, h * w, d) of an `old` grid, bicubically interpolated to a `new` one.

    how: with the scale (side + .1) / old side, as in the code of DINO and DINOv2; to the new sides; or to those,
        smoothed where they are smaller, as in the code of DINOv2 with registers.
    """
    if is_symbolic(new):
        return positions_by_matrices(positions, old, new, how)
    if new == old:
        return positions
    spatial = rearrange(positions, "1 (h w) d -> 1 d h w", h=old[0])
    if how != "offset":
        resized = F.interpolate(spatial.float(), size=new, mode="bicubic", antialias=how == "antialias")
        return rearrange(resized, "1 d h w -> 1 (h w) d")
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    resized = F.interpolate(spatial.float(), scale_factor=scale, mode="bicubic")
    assert resized.shape[-2:] == new, (resized.shape, new)
    return rearrange(resized, "1 d h w -> 1 (h w) d")


def is_symbolic(grid: tuple[int, int]) -> bool:
    """Whether a side is known only when a graph that is being made will run."""
    return any(isinstance(side, torch.SymInt) for side in grid)


def positions_by_matrices(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], how: Interpolation = "offset"
) -> Tensor:
    """What `resize_positions` gives, as products with two matrices that a graph can make of sides it does not know."""
    made = [_weights(*sides, how) for sides in zip(old, new, strict=True)]
    same = (torch.arange(new[0]).amax(dim=0) + 1 == old[0]) & (torch.arange(new[1]).amax(dim=0) + 1 == old[1])
    eyes = (torch.arange(after)[:, None] == torch.arange(before) for before, after in zip(old, new, strict=True))
    by_row, by_column = (
        torch.where(same, eye.float(), weights).to(positions.device) for eye, weights in zip(eyes, made, strict=True)
    )
    table = rearrange(positions[0].float(), "(h w) d -> h w d", h=old[0])
    return rearrange(torch.einsum("rh,hwd,cw->rcd", by_row, table, by_column), "r c d -> 1 (r c) d")


def _weights(old: int, new: int, how: Interpolation) -> Tensor:
    """(new, old) what each old place along a side weighs at each new one."""
    scale = old / (new + 0.1 if how == "offset" else new)
    middles = (torch.arange(new) + 0.5) * scale  # in old places, whose own are at .5, 1.5, ..
    if how == "antialias":
        spread = torch.clamp(torch.ones(()) * scale, min=1.0)
        weights = _cubic((torch.arange(old) + 0.5 - middles[:, None]) / spread, -0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    first = (middles - 0.5).floor()
    taps = first[:, None] + torch.arange(-1, 3)
    weights = _cubic(taps - (middles[:, None] - 0.5), -0.75)
    found = taps.clamp(0, old - 1)[..., None] == torch.arange(old)
    return (weights[..., None] * found).sum(dim=1)


def _cubic(away: Tensor, a: float) -> Tensor:
    """Keys' kernel at these distances."""
    away = away.abs()
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
    return torch.where(away <= 1, near, torch.where(away < 2, far, 0.0))


def resize_relative_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], num_extra: int = 0) -> Tensor:
    """A table of relative positions ((2h - 1) * (2w - 1) + num_extra, heads), bicubically interpolated to a new window.

    The last `num_extra` rows (BEiT's three for the class token) stay as they are.
    """
    if new == old:
        return table
    offsets, extra = (table[: len(table) - num_extra], table[len(table) - num_extra :])
    spatial = rearrange(offsets, "(h w) heads -> 1 heads h w", h=2 * old[0] - 1)
    resized = F.interpolate(spatial.float(), size=(2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic")
    return torch.cat([rearrange(resized, "1 heads h w -> (h w) heads").to(table.dtype), extra])


def resize_line(table: Tensor, length: int) -> Tensor:
    """A table (n, d) of distances along a line, linearly interpolated to `length` of them."""
    if len(table) == length:
        return table
    line = F.interpolate(rearrange(table, "n d -> 1 d n").float(), size=length, mode="linear")
    return rearrange(line, "1 d n -> n d").to(table.dtype)


def nearest_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions (1, h * w, d) of an `old` grid at a `new` one: each place has those of its nearest neighbour."""
    if new == old:
        return positions
    spatial = rearrange(positions, "1 (h w) d -> 1 d h w", h=old[0])
    return rearrange(F.interpolate(spatial, size=new, mode="nearest"), "1 d h w -> 1 (h w) d")


def nearest_on_line(table: Tensor, length: int) -> Tensor:
    """A table (1, n, d) of places along a line at another number of them: each has its nearest neighbour's row."""
    if table.shape[1] == length:
        return table
    line = rearrange(table, "1 n d -> 1 d n")
    return rearrange(F.interpolate(line, size=length, mode="nearest"), "1 d n -> 1 n d")
