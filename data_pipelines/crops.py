"""Parameters and an image make crops: what is asked of an executor, and which executors there are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image

from data_pipelines.draws import CropParams
from data_pipelines.views import Interpolation

#: `native`: the kernel in C; `wheels`: torch and OpenCV, no compiler needed; `auto`: native where it is built.
ExecutorName = Literal["auto", "native", "wheels"]
SOLARISE_THRESHOLD = 128
_log = logging.getLogger(__name__)


class CropJob(NamedTuple):
    """One crop to be made of an image."""

    params: CropParams  # what to do, box in px of the image
    interpolation: Interpolation  # of the resize, with antialiasing
    out: np.ndarray  # (c, height, width) of the image's type, C-contiguous, written to


#: Makes crops of one image, (h, w, c) of any strides; called by many threads at once. Boxes may have fractions of
#: pixels; pixels that lie outside of a box play no part in its crop.
Executor = Callable[[np.ndarray, Sequence[CropJob]], None]


def executor(name: ExecutorName = "auto") -> Executor:
    """The executor of that name; all show the same pictures within the bounds that tests/ state.

    It takes images of any channels and 8 or 16 bits: those that are not 8-bit grey or RGB go to `any_channels`.

    Raises:
        ValueError: No such executor, or `native` where the kernel is not built.
    """
    from data_pipelines import any_channels, native, wheels

    if name not in ("auto", "native", "wheels"):
        raise ValueError(f"executor {name!r} is not known; choose auto, native or wheels")
    if name == "native" and not native.BUILT:
        raise ValueError(f"executor native: the crop kernel is not built; {native.HOW_TO_BUILD}, or choose wheels")
    if name == "auto" and not native.BUILT:
        _tell_once(native.HOW_TO_BUILD)
    plain = native.render if name != "wheels" and native.BUILT else wheels.render

    def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
        (plain if any_channels.is_plain(image) else any_channels.render)(image, jobs)

    return render


@cache
def _tell_once(how_to_build: str) -> None:
    _log.warning("the crop kernel is not built, so crops take about twice as long; %s", how_to_build)


def to_pillow(image: np.ndarray) -> Image.Image:
    """(h, w, c) uint8 as mode RGB, or L for one channel."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def write_channels(image: Image.Image, out: np.ndarray) -> None:
    """Copy an RGB or L image into `out`, (c, h, w) uint8."""
    pixels = np.asarray(image)
    out[...] = pixels if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")
