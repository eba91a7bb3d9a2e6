"""Which units of an image are hidden: drawn with numpy in the loader's threads (imports no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange

from data_pipelines.rng import Purpose, Stream, permutation
from pretrain.methods.mask_counts import num_hidden, num_shown

if TYPE_CHECKING:
    from pretrain.methods.masks import MaskConfig

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
#: How masks are drawn. A run whose checkpoints say otherwise, or nothing, began under another version of these draws.
DRAWS = "splitmix64"


def mask_stream(seed: int, step: int, row: int) -> Stream:
    """Of one row of one global batch: the same on any number of ranks, and under any version of NumPy."""
    return Stream(seed, Purpose.MASKS, step, row)


def draw_units(stream: Stream, mask: MaskConfig, grid: tuple[int, int]) -> BoolArray:
    """The hidden units (gh, gw) of one image, of the kind that `mask` says."""
    if mask.kind == "random":
        return random_units(stream, grid, num_hidden(mask, grid))
    if mask.kind == "one_in_2x2":
        return one_in_2x2(stream, grid)
    return blockwise(stream, grid, num_hidden(mask, grid), mask.min_block, mask.min_aspect)


def draw_patches(stream: Stream, mask: MaskConfig, grid: Sequence[int]) -> BoolArray:
    """The hidden patches (n,) of an image of its own shape, of `grid` rows and columns; one at least is left."""
    rows, columns = grid
    if mask.kind == "random":
        return random_units(stream, (rows, columns), min(num_hidden(mask, (rows, columns)), rows * columns - 1)).ravel()
    return draw_units(stream, mask, (rows, columns)).ravel()


def random_units(stream: Stream, grid: tuple[int, int], count: int) -> BoolArray:
    """`count` hidden units at random: the largest of uniform noise (MAE, appendix A; SimMIM, section 3.2)."""
    hidden = np.ones(grid[0] * grid[1], dtype=np.bool_)
    hidden[permutation(stream, hidden.size)[: hidden.size - count]] = False
    return hidden.reshape(grid)


def one_in_2x2(stream: Stream, grid: tuple[int, int]) -> BoolArray:
    """One visible unit in every 2x2 quad; each corner is visible equally often over the image, or nearly so.

    UM-MAE's uniform sampling (Li et al. 2022, section 3.1): the visible units form a dense map of half the side.
    """
    quads = (grid[0] // 2) * (grid[1] // 2)
    corners = permutation(stream, quads) + stream.integer(4)
    hidden = np.ones((quads, 4), dtype=np.bool_)
    hidden[np.arange(quads), corners % 4] = False
    return rearrange(hidden, "(qh qw) (dy dx) -> (qh dy) (qw dx)", qh=grid[0] // 2, dy=2)


def with_secondary(stream: Stream, mask: MaskConfig, grid: tuple[int, int]) -> tuple[BoolArray, BoolArray]:
    """Some of the visible units become a mask token as well (UM-MAE, section 3.2)."""
    dropped = one_in_2x2(stream, grid)
    visible = np.flatnonzero(~dropped)
    kept = num_shown(mask, grid)
    replaced = np.zeros(dropped.size, dtype=np.bool_)
    replaced[visible[permutation(stream, visible.size)[kept:]]] = True
    return dropped, replaced.reshape(dropped.shape)


def blockwise(stream: Stream, grid: tuple[int, int], count: int, min_block: int, min_aspect: float) -> BoolArray:
    """Rectangles until about `count` units are hidden, never more (BEiT, Bao et al. 2022, algorithm 1).

    A block has between `min_block` and the remaining number of units, whichever is less, and a log-uniform aspect.
    Of 10 tries the first that adds between 1 and what remains is taken; when none does, the mask is done, so counts
    vary.
    """
    height, width = grid
    hidden = np.zeros(grid, dtype=np.bool_)
    total = 0
    low, high = math.log(min_aspect), math.log(1 / min_aspect)
    while total < count:
        added = 0
        for _ in range(10):
            remaining = count - total
            area = stream.uniform(
                *sorted((min_block, remaining))
            )  # as the paper's code: smaller blocks towards the end
            aspect = math.exp(stream.uniform(low, high))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < rows < height and 0 < columns < width):
                continue
            top, left = stream.integer(height - rows + 1), stream.integer(width - columns + 1)
            block = hidden[top : top + rows, left : left + columns]
            added = int(block.size - block.sum())
            if 0 < added <= remaining:
                block[:] = True
                break
            added = 0
        if not added:
            break
        total += added
    if not total:  # a grid too small for any block: hide one unit, for a loss over nothing is no loss
        hidden[stream.integer(height), stream.integer(width)] = True
    return hidden
