"""The masks of iBOT's patch loss (imports no torch)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.rng import DrawFields, Purpose, Stream
from pretrain.stream.masking import blockwise

if TYPE_CHECKING:
    from pretrain.methods.dino.config import IbotConfig


def ibot_masks(ibot: IbotConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields:
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

    def draw(rng: np.random.Generator, step: int, row: int) -> dict[str, np.ndarray]:
        turn = Stream(Purpose.MASKS, step).integer(count)
        maps = []
        for view in range(2):
            place = ((2 * row + view) * factor + turn) % count
            hidden = np.zeros(grid, dtype=np.bool_)
            if place < masked:
                ratio = low + (high - low) * (place + rng.random()) / masked
                hidden = blockwise(rng, grid, max(1, int(grid[0] * grid[1] * ratio)), ibot.min_block, ibot.min_aspect)
            maps.append(hidden)
        return {"token_mask": np.stack(maps)}

    return draw
