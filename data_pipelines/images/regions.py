"""Which part of an image its crops need, decided before it is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

FACTORS = (8, 4, 2)  # by which a JPEG may be decoded smaller
#: A part is worth its trouble below this share of the image's pixels.
_WORTHWHILE = 0.9
#: Decoded px for each px of a crop, at least. On photos such a crop is like one of the image at its whole size to 46 dB
#: in the median, 41 at the 5th percentile; with 1 px for each, to 42 and 33.
_DECODED_PER_PX = 1.5

Box = tuple[float, float, float, float]  # left, top, right, bottom in px


class Region(NamedTuple):
    """What of an image is needed, at least."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in px of the whole image, upright
    factor: int = 1  # the image may be decoded this many times smaller


class Picture(NamedTuple):
    """An image, or the part of it that was decoded."""

    pixels: np.ndarray  # (h, w, c)
    left: int = 0  # where they begin, in px of the whole image; below 0 where the last decoded px are padding
    top: int = 0
    factor: int = 1  # px of the image for each decoded one, in both directions
    notes: tuple[str, ...] = ()  # of `CASES`: what was met that only the pixels, or the whole file, tell

    @property
    def is_part(self) -> bool:
        """Whether boxes of the whole image are others here."""
        return bool(self.left or self.top or self.factor > 1)

    def within(self, box: Box) -> Box:
        """A box of the whole image in px of `pixels`; integers where they were not scaled."""
        left, top, right, bottom = box[0] - self.left, box[1] - self.top, box[2] - self.left, box[3] - self.top
        if self.factor == 1:
            return left, top, right, bottom
        return left / self.factor, top / self.factor, right / self.factor, bottom / self.factor


#: Told an image's height and width, upright, before it is decoded: which part is needed.
Choose = Callable[[tuple[int, int]], Region]


def whole(size: tuple[int, int]) -> Region:
    """All of an image."""
    return Region((0, 0, size[1], size[0]))


def needed(
    size: tuple[int, int], crops: Sequence[tuple[Box, tuple[int, int]]], partial: bool = True, scaling: bool = True
) -> Region:
    """The part of an image that crops touch, at the smallest size that still leaves each of them some px to spare.

    Args:
        size: Height and width of the image.
        crops: The box of each crop, in px of the image, and the (height, width) it is resized to.
        partial: Whether anything may be left out; else the box is the whole image.
        scaling: Whether the factor may be other than 1.
    """
    region = whole(size)
    if partial:
        boxes = [box for box, _ in crops]
        left, top = math.floor(min(box[0] for box in boxes)), math.floor(min(box[1] for box in boxes))
        right, bottom = math.ceil(max(box[2] for box in boxes)), math.ceil(max(box[3] for box in boxes))
        if (right - left) * (bottom - top) < _WORTHWHILE * size[0] * size[1]:
            region = Region((left, top, right, bottom))
    if scaling:
        spare = min(min((box[2] - box[0]) / width, (box[3] - box[1]) / height) for box, (height, width) in crops)
        factor = next((factor for factor in FACTORS if spare >= factor * _DECODED_PER_PX), 1)
        region = region._replace(factor=factor)
    return region
