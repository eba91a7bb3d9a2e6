"""A mask cut as a crop of its image is: each pixel has the class of the one pixel in which its middle lies."""

from __future__ import annotations

import numpy as np

from data_pipelines.transforms.params import CropParams

IGNORED = -1  # of a cut mask: the highest level, which is not to be judged


def cut_mask(mask: np.ndarray, params: CropParams, out: np.ndarray) -> None:
    """Write the part of a mask (h, w) that a crop shows into `out` (height, width), int32, `IGNORED` where it is."""
    left, top, right, bottom = params.box
    rows = _places(top, bottom, out.shape[0], mask.shape[0])
    columns = _places(left, right, out.shape[1], mask.shape[1])
    cut = mask[rows[:, None], columns[::-1] if params.flip else columns]
    out[:] = np.where(cut == np.iinfo(mask.dtype).max, IGNORED, cut.astype(np.int32))


def _places(begin: float, end: float, count: int, side: int) -> np.ndarray:
    """(count,) int64: the pixels of `side` in which the middles of so many parts of begin .. end lie."""
    middles = begin + (np.arange(count) + 0.5) * ((end - begin) / count)
    return np.clip(np.floor(middles), 0, side - 1).astype(np.int64)
