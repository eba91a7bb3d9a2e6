"""The seam between parameters and pixels: what is asked of an backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image

from data_pipelines.transforms.config import Interpolation
from data_pipelines.transforms.params import CropParams

SOLARISE_THRESHOLD = 128
NO_COLOURS = CropParams((0, 0, 1, 1))[2:]  # of what is only cut, resized and perhaps mirrored


class CropJob(NamedTuple):
    """One crop to be made of an image."""

    params: CropParams  # what to do, box in px of the image
    interpolation: Interpolation  # of the resize, with antialiasing
    out: np.ndarray  # (c, height, width) of the image's type, C-contiguous, written to


#: Makes crops of one image, (h, w, c) of any strides; called by many threads at once. Boxes may have fractions of
#: pixels; pixels that lie outside of a box play no part in its crop.
Backend = Callable[[np.ndarray, Sequence[CropJob]], None]


def to_pillow(image: np.ndarray) -> Image.Image:
    """(h, w, c) uint8 as mode RGB, or L for one channel."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def write_channels(image: Image.Image, out: np.ndarray) -> None:
    """Copy an RGB or L image into `out`, (c, h, w) uint8."""
    pixels = np.asarray(image)
    out[...] = pixels if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")
