"""Which units of an image are hidden: drawn with numpy in the loader's threads (imports no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from einops import rearrange

from data_pipelines.rng import Purpose, Stream
from pretrain.config import IbotConfig, MaskConfig, MethodConfig

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
#: From a generator, the step and the row to (dropped, replaced), each (gh, gw) bool (DINO: (2, gh, gw)) or None.
DrawMask = Callable[[np.random.Generator, int, int], tuple[BoolArray | None, BoolArray | None]]


def mask_grid(mask: MaskConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of mask units in an image of `image_size` (h, w) px."""
    return image_size[0] // mask.unit, image_size[1] // mask.unit


def num_hidden(mask: MaskConfig, grid: tuple[int, int]) -> int:
    """Units hidden in every image (blockwise: at most so many).

    MAE keeps int(n * (1 - ratio)) and SimMIM hides ceil(n * ratio): the same number, here free of float rounding.
    BEiT hides int(n * ratio).
    """
    exact = round(grid[0] * grid[1] * mask.ratio, 6)
    hidden = math.floor(exact) if mask.kind == "blockwise" else math.ceil(exact)
    return min(max(hidden, 1), grid[0] * grid[1] - 1)


def draw_mask_for(
    method: MethodConfig, image_size: tuple[int, int], stride: int | None = None, batch_size: int = 1
) -> DrawMask | None:
    """What the loader calls once a row to draw that image's mask; None for methods without one.

    `stride` (px) of the encoder and the global `batch_size` count for DINO's patch loss only.
    """
    if method.name == "dino" and method.ibot is not None:
        return _ibot_masks(method.ibot, image_size, stride, batch_size)
    if method.name not in ("mae", "mim"):
        return None
    mask, grid = method.mask, mask_grid(method.mask, image_size)
    if method.name == "mim":
        return lambda rng, step, row: (None, _draw(rng, mask, grid))
    if mask.secondary:
        return lambda rng, step, row: _with_secondary(rng, mask, one_in_2x2(rng, grid))
    return lambda rng, step, row: (_draw(rng, mask, grid), None)


def _ibot_masks(ibot: IbotConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawMask:
    """Of the 2B global crops of a step exactly a share is masked, at ratios stratified over those that are.

    DINOv2's collate function, made a function of (step, row) alone: a crop's place in the strata is an affine bijection
    of its number, turned anew at every step.
    """
    unit = ibot.unit or stride
    assert unit is not None
    grid = (image_size[0] // unit, image_size[1] // unit)
    count = 2 * batch_size
    masked = max(1, round(count * ibot.masked_share))
    factor = next(n for n in range(max(1, round(count * 0.618)), 2 * count + 2) if math.gcd(n, count) == 1)
    low, high = ibot.ratio

    def draw(rng: np.random.Generator, step: int, row: int) -> tuple[None, BoolArray]:
        turn = Stream(Purpose.MASKS, step).integer(count)
        maps = []
        for view in range(2):
            place = ((2 * row + view) * factor + turn) % count
            hidden = np.zeros(grid, dtype=np.bool_)
            if place < masked:
                ratio = low + (high - low) * (place + rng.random()) / masked
                hidden = blockwise(rng, grid, max(1, int(grid[0] * grid[1] * ratio)), ibot.min_block, ibot.min_aspect)
            maps.append(hidden)
        return None, np.stack(maps)

    return draw


def _draw(rng: np.random.Generator, mask: MaskConfig, grid: tuple[int, int]) -> BoolArray:
    if mask.kind == "random":
        return random_units(rng, grid, num_hidden(mask, grid))
    if mask.kind == "one_in_2x2":
        return one_in_2x2(rng, grid)
    return blockwise(rng, grid, num_hidden(mask, grid), mask.min_block, mask.min_aspect)


def random_units(rng: np.random.Generator, grid: tuple[int, int], count: int) -> BoolArray:
    """`count` hidden units at random: the largest of uniform noise (MAE, appendix A; SimMIM, section 3.2)."""
    order = np.argsort(rng.random(grid[0] * grid[1]), kind="stable")
    hidden = np.ones(grid[0] * grid[1], dtype=np.bool_)
    hidden[order[: hidden.size - count]] = False
    return hidden.reshape(grid)


def one_in_2x2(rng: np.random.Generator, grid: tuple[int, int]) -> BoolArray:
    """One visible unit in every 2x2 quad; each corner is visible equally often over the image, or nearly so.

    UM-MAE's uniform sampling (Li et al. 2022, section 3.1): the visible units form a dense map of half the side.
    """
    quads = (grid[0] // 2) * (grid[1] // 2)
    corners = rng.permutation(quads) + rng.integers(4)
    hidden = np.ones((quads, 4), dtype=np.bool_)
    hidden[np.arange(quads), corners % 4] = False
    return rearrange(hidden, "(qh qw) (dy dx) -> (qh dy) (qw dx)", qh=grid[0] // 2, dy=2)


def _with_secondary(rng: np.random.Generator, mask: MaskConfig, dropped: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Some of the visible units become a mask token as well (UM-MAE, section 3.2)."""
    visible = np.flatnonzero(~dropped)
    kept = int(round(visible.size * (1 - mask.secondary), 6))  # as the authors count
    chosen = rng.permutation(visible)[kept:]
    replaced = np.zeros(dropped.size, dtype=np.bool_)
    replaced[chosen] = True
    return dropped, replaced.reshape(dropped.shape)


def blockwise(
    rng: np.random.Generator, grid: tuple[int, int], count: int, min_block: int, min_aspect: float
) -> BoolArray:
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
            area = rng.uniform(*sorted((min_block, remaining)))  # as the paper's code: smaller blocks towards the end
            aspect = math.exp(rng.uniform(low, high))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < rows < height and 0 < columns < width):
                continue
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
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
        hidden[rng.integers(height), rng.integers(width)] = True
    return hidden
