"""Masks and depths made fit to be looked at."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.maps import BadMapError, ignored_level

BACKGROUND = 0  # is not coloured
_SHARE = 0.5  # of the colour
_HUE_STEP = 0.618033988749895  # the golden ratio's: neighbouring classes are far apart, however many there are
_IGNORED = (128, 128, 128)


def with_maps(dataset: Dataset, sample: int, picture: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture of a sample (w x h, RGB) with its mask over it and its depths beside it, and lines about them.

    What the data set has none of adds nothing; a sample without one, or with one that cannot be used, says so.
    """
    lines = []
    for kind in ("mask", "depth"):
        if not dataset.index.has(kind):
            continue
        try:
            found = maps.read(dataset, sample, kind, (picture.height, picture.width))
        except BadMapError as error:
            lines.append(str(error).partition(": ")[2] or str(error))
            continue
        if found is None:
            lines.append(f"no {kind}")
        elif kind == "mask":
            picture = coloured(picture, found)
            classes = [str(level) for level in np.unique(found).tolist() if level != ignored_level(found)]
            lines.append(f"classes {' '.join(classes)}")
        else:
            picture = beside(picture, found)
    return picture, tuple(lines)


def coloured(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """A picture (w x h) under the colours of the classes of a mask (h, w); what is not to be judged is grey."""
    levels, places = np.unique(mask, return_inverse=True)
    palette = np.array([_IGNORED if level == ignored_level(mask) else colour_of(level) for level in levels.tolist()])
    pixels = np.asarray(picture, dtype=np.float32)
    mixed = (1 - _SHARE) * pixels + _SHARE * palette[places.reshape(mask.shape)]
    return Image.fromarray(np.where((mask == BACKGROUND)[..., None], pixels, mixed).round().astype(np.uint8))


def colour_of(level: int) -> tuple[int, int, int]:
    """Of a class: red, green and blue, the same everywhere."""
    red, green, blue = colorsys.hsv_to_rgb((level * _HUE_STEP) % 1, 0.9, 1.0 - 0.3 * (level % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def beside(picture: Image.Image, depths: np.ndarray) -> Image.Image:
    """A picture (w x h) and, to its right, the depths (h, w) in grey from the least to the largest; unknown is red."""
    known = np.isfinite(depths)
    low, high = (float(depths[known].min()), float(depths[known].max())) if known.any() else (0.0, 1.0)
    grey = np.nan_to_num((depths - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)
    shown = np.where(known[..., None], grey[..., None], np.array([200, 0, 0], dtype=np.uint8))
    return Image.fromarray(np.concatenate([np.asarray(picture), shown.astype(np.uint8)], axis=1))
