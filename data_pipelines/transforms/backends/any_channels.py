"""Crops of images that are not 8-bit grey or RGB: any number of channels, 8 or 16 bits; and what of a recipe they
can't have.

Resizing is Pillow's own, channel by channel in floating point, so a crop of RGB is the one that `opencv` makes but
for rounding. Values are rounded once, at the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from data_pipelines.images.regions import Box
from data_pipelines.transforms.config import Crop, Interpolation, Views
from data_pipelines.wording import counted

if TYPE_CHECKING:
    from data_pipelines.transforms.backends.base import CropJob

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
cv2.setNumThreads(0)  # the loader's threads share the cores already
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None, None]

Resize = Callable[[np.ndarray, Box, tuple[int, int], Interpolation], np.ndarray]


def is_plain(image: np.ndarray) -> bool:
    """Whether (h, w, c) is 8-bit grey or RGB, which other backends are faster at."""
    return image.dtype == np.uint8 and image.shape[2] in (1, 3)


def fitting(views: Views, channels: int) -> tuple[Views, tuple[str, ...]]:
    """The recipe without what needs red, green and blue, and the names of what that was.

    Crops, flips, brightness, contrast, blur and solarisation mean something for channels of any kind; saturation,
    hue and grey do not.
    """
    if channels == 3:
        return views, ()
    left_out: list[str] = []

    def without(crop: Crop) -> Crop:
        brightness, contrast, saturation, hue = crop.jitter
        for name, value in (("saturation", saturation), ("hue", hue), ("grayscale", crop.grayscale)):
            if value and name not in left_out:
                left_out.append(name)
        # mypy does not know that pydantic's dataclasses are dataclasses
        return dataclasses.replace(crop, jitter=(brightness, contrast, 0.0, 0.0), grayscale=0.0)  # type: ignore[type-var]

    local = views.local_crops
    changed = dataclasses.replace(  # type: ignore[type-var]
        views,
        global_crops=tuple(without(crop) for crop in views.global_crops),
        local_crops=None if local is None else without(local),
    )
    return changed, tuple(left_out)


def left_out_line(views: Views, channels: int) -> list[str]:
    """A line for the person who starts a run, if its recipe has what `fitting` leaves out."""
    _, names = fitting(views, channels)
    if not names:
        return []
    images = f"images of {counted(channels, 'channel')}"
    return [f"left out of views: {', '.join(names)}, which need RGB; {images} have no colours"]


def render(image: np.ndarray, jobs: Sequence[CropJob], resize: Resize | None = None) -> None:
    """Make the crops that `jobs` ask for, of (h, w, c) uint8 or uint16; see `base.Backend`.

    `resize` does what `resized` does, which is the default.

    Brightness multiplies. Contrast goes towards the mean: of the luma for RGB, else of each channel. Solarisation
    inverts the upper half of the range. Saturation, hue and grey are for RGB only.
    """
    full = float(np.iinfo(image.dtype).max)
    for job in jobs:
        params = job.params
        planes = (resize or resized)(image, params.box, (job.out.shape[1], job.out.shape[2]), job.interpolation)
        if params.flip:
            planes = planes[:, :, ::-1]
        for name, factor in params.jitter:
            planes = np.clip(_JITTER[name](planes, factor, full), 0, full)
        if params.grayscale and len(planes) == 3:
            planes = np.repeat(_luma(planes), 3, axis=0)
        if params.blur_radius is not None:
            planes = _blurred(planes, params.blur_radius)
        if params.solarise:
            planes = np.where(planes >= (full + 1) / 2, full - planes, planes)
        store(planes, job.out)


def resized(image: np.ndarray, box: Box, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Cut `box` out of (h, w, c) and resize it to `size`, antialiased: (c, height, width) float32 within the range of
    the image's type. The pixels outside of the box play no part."""
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    cut = image[top:bottom, left:right]
    planes = np.ascontiguousarray(np.moveaxis(cut, 2, 0), dtype=np.float32)
    within = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    if cut.shape[:2] == size and within == (0, 0, size[1], size[0]):
        return planes
    filter, (height, width) = RESAMPLING[interpolation], size
    resized = [np.asarray(Image.fromarray(plane).resize((width, height), filter, within)) for plane in planes]
    return np.clip(np.stack(resized), 0, np.iinfo(image.dtype).max)  # bicubic and Lanczos overshoot


def store(planes: np.ndarray, out: np.ndarray) -> None:
    """Round (c, h, w) into `out` of the same shape."""
    np.rint(planes, out=out, casting="unsafe")


def _luma(planes: np.ndarray) -> np.ndarray:
    return (planes * _LUMA).sum(axis=0, keepdims=True)


def _blurred(planes: np.ndarray, radius: float) -> np.ndarray:
    """By a Gaussian of this standard deviation in px, the border repeated as Pillow does."""
    side = (2 * max(1, round(4 * radius)) + 1,) * 2
    return np.stack([cv2.GaussianBlur(plane, side, radius, borderType=cv2.BORDER_REPLICATE) for plane in planes])


def _brightness(planes: np.ndarray, factor: float, full: float) -> np.ndarray:
    return planes * np.float32(factor)


def _contrast(planes: np.ndarray, factor: float, full: float) -> np.ndarray:
    measured = _luma(planes) if len(planes) == 3 else planes
    mean = measured.mean(axis=(1, 2), keepdims=True)
    return mean + np.float32(factor) * (planes - mean)


def _saturation(planes: np.ndarray, factor: float, full: float) -> np.ndarray:
    grey = _luma(planes)
    return grey + np.float32(factor) * (planes - grey)


def _hue(planes: np.ndarray, turns: float, full: float) -> np.ndarray:
    colours = cv2.cvtColor(np.ascontiguousarray(np.moveaxis(planes, 0, 2) / np.float32(full)), cv2.COLOR_RGB2HSV)
    colours[:, :, 0] = (colours[:, :, 0] + np.float32(360 * turns)) % 360
    return np.moveaxis(cv2.cvtColor(colours, cv2.COLOR_HSV2RGB), 2, 0) * np.float32(full)


_JITTER: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}
