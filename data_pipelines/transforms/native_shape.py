"""Crops of their own shape: how many patches one has, and into how many rows and columns they fall.

NaViT's resolution sampling (Dehghani et al. 2023, section 2.1). How many patches a crop may have is drawn before
anything is known of its image, so that the work of a batch is known before an image of it is read.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from data_pipelines.rng import Purpose, stream_keys, uniform_table
from data_pipelines.transforms.config import Crop, Views

#: Deviation of the normal, cut at -1 and 1, that goes from the smallest to the largest area.
_DEVIATION = 0.5
_PLACES = 512  # of its distribution function

Box = tuple[float, float, float, float]  # left, top, right, bottom in px


def words(identity: tuple[int, ...]) -> tuple[int, int, int, int, int]:
    """Of an identity of `sampler.Row`: seed, data set, epoch, sample, repeat."""
    seed, _, dataset, epoch, sample, *repeat = identity
    return seed, dataset, epoch, sample, repeat[0] if repeat else 0


def tokens_of(
    views: Views,
    seed: int,
    dataset: int | np.ndarray,
    epoch: int | np.ndarray,
    sample: int | np.ndarray,
    repeat: int | np.ndarray,
) -> np.ndarray:
    """The patches that the crops of rows may have at most, global ones first: (views, ...) int64."""
    crops: list[Crop] = list(views.global_crops)
    if views.local_crops is not None:
        crops += [views.local_crops] * views.local_crops.count
    drawn = []
    for view, crop in enumerate(crops):
        keys = stream_keys(seed, Purpose.AREAS, dataset, epoch, sample, repeat, view)
        drawn.append(_areas(crop, uniform_table(keys.reshape(-1), 1)[:, 0]).reshape(keys.shape))
    return np.stack(drawn)


def _areas(crop: Crop, uniform: np.ndarray) -> np.ndarray:
    assert crop.area is not None
    low, high = crop.area
    places, below = _cut_normal()
    share = (np.interp(uniform, below, places) + 1) / 2
    return low + np.minimum((share * (high - low + 1)).astype(np.int64), high - low)


@lru_cache(1)
def _cut_normal() -> tuple[np.ndarray, np.ndarray]:
    """Places in -1 .. 1, and the share of a normal of deviation `_DEVIATION`, cut there, that lies below each."""
    places = np.linspace(-1.0, 1.0, _PLACES + 1)
    below = np.array([math.erf(place / (_DEVIATION * math.sqrt(2))) for place in places.tolist()])
    return places, (below - below[0]) / (below[-1] - below[0])


def grid_of(height: float, width: float, tokens: int) -> tuple[int, int]:
    """Rows and columns of at most `tokens` patches, as many as go with a shape close to height x width."""
    scale = math.sqrt(tokens / (height * width))
    rows, columns = max(1.0, height * scale), max(1.0, width * scale)
    rows, columns = min(rows, tokens / columns, tokens), min(columns, tokens / rows, tokens)
    candidates = [
        (r, c)
        for r in {math.floor(rows), math.ceil(rows)}
        for c in {math.floor(columns), math.ceil(columns)}
        if 0 < r * c <= tokens
    ]
    target = math.log(height / width)
    return max(candidates, key=lambda grid: (grid[0] * grid[1] * _likeness(grid, target), grid))


def _likeness(grid: tuple[int, int], target: float) -> float:
    """The share of an image of the logarithmic aspect `target` that is left when it is cut to the aspect of a grid."""
    return math.exp(-abs(math.log(grid[0] / grid[1]) - target))


def trimmed(box: Box, grid: tuple[int, int]) -> Box:
    """The middle part of a box that has the aspect of the grid, so that nothing is squashed."""
    left, top, right, bottom = box
    height, width = bottom - top, right - left
    side = min(height / grid[0], width / grid[1])
    across = max(0.0, (width - side * grid[1]) / 2)  # never beyond the box, as rounding might have it
    down = max(0.0, (height - side * grid[0]) / 2)
    return left + across, top + down, right - across, bottom - down
