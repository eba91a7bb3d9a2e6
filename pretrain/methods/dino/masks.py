"""The masks of iBOT's patch loss (imports no torch)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.rng import DrawFields, Purpose, Stream, permutation
from pretrain.stream.masking import blockwise, mask_stream

if TYPE_CHECKING:
    from pretrain.methods.dino.config import IbotConfig


def check_ibot_counts(ibot: IbotConfig, unit: int, image_size: tuple[int, int]) -> None:
    """Raise ValueError where a masked crop would hide none of its units of `unit` px, or all of them."""
    units = (image_size[0] // unit) * (image_size[1] // unit)
    most = int(round(units * ibot.ratio[1], 6))
    if units > 1 and most:
        return
    raise ValueError(
        f"method.ibot hides {most if units > 1 else 'all'} of the units of a crop: at {unit} px a crop of "
        f"{image_size[0]}x{image_size[1]} px has {units}, of which ratio hides up to {ibot.ratio[1]:g}. Take a smaller "
        "method.ibot.unit, larger views.global_crops, or a higher method.ibot.ratio"
    )


Grid = tuple[int, int]


@lru_cache(maxsize=16)  # of a few steps: each of their rows asks
def _places(seed: int, step: int, count: int) -> np.ndarray:
    """In which of its `count` places a step puts each of its masks; as `mask_stream` independent of the ranks."""
    return permutation(Stream(seed, Purpose.MASKS, step), count)


def ibot_masks(ibot: IbotConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields:
    """Of the 2B global crops of a step exactly a share is masked, at ratios stratified over those that are.

    DINOv2's collate function, made a function of (seed, step, row) alone: the places of the crops in the strata are
    shuffled anew at every step, so that what one view of an image hides says nothing of the other.
    """
    unit = ibot.unit or stride
    assert unit is not None
    grid = (image_size[0] // unit, image_size[1] // unit)
    maps_of = _of_both(ibot, batch_size)
    return lambda seed, step, row: {"token_mask": np.stack(maps_of(seed, step, row, (grid, grid)))}


def native_ibot_masks(ibot: IbotConfig, batch_size: int) -> DrawFields:
    """`ibot_masks` of crops of their own shape, each on the grid (rows, columns) of its own patches."""
    maps_of = _of_both(ibot, batch_size)

    def draw(seed: int, step: int, row: int, grids: np.ndarray) -> dict[str, list[np.ndarray]]:
        first, second = ((rows, columns) for rows, columns in grids.tolist())
        return {"token_mask": [drawn.ravel() for drawn in maps_of(seed, step, row, (first, second))]}

    return draw


def _of_both(ibot: IbotConfig, batch_size: int) -> Callable[[int, int, int, tuple[Grid, Grid]], list[np.ndarray]]:
    """From seed, step, row and the grids of its two global crops to what is hidden of each."""
    count = 2 * batch_size
    masked = max(1, round(count * ibot.masked_share))
    low, high = ibot.ratio

    def draw(seed: int, step: int, row: int, grids: tuple[Grid, Grid]) -> list[np.ndarray]:
        stream, maps = mask_stream(seed, step, row), [np.zeros(grid, dtype=np.bool_) for grid in grids]
        for view, place in enumerate(_places(seed, step, count)[2 * row : 2 * row + 2].tolist()):
            if place < masked:
                ratio = low + (high - low) * (place + stream.random()) / masked
                rows, columns = grids[view]
                hidden = max(1, int(rows * columns * ratio))
                if rows * columns > 1:  # of a single patch nothing would be left
                    maps[view] = blockwise(stream, (rows, columns), hidden, ibot.min_block, ibot.min_aspect)
        return maps

    return draw
