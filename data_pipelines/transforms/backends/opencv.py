"""Crops of 8-bit grey and RGB without a compiler: torch's antialiased resize and OpenCV's loops, Pillow's for the rest.

The operations are Pillow's, in its order and with its clamping; what OpenCV rounds otherwise, and a blur in one pass
instead of six, differ by a level here and there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from einops import rearrange
from PIL import Image

from data_pipelines.transforms.backends.base import NO_COLOURS, SOLARISE_THRESHOLD, CropJob
from data_pipelines.transforms.config import Interpolation
from data_pipelines.transforms.params import CropParams

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_BLUR_PASSES = 3
_DROP_FRACTION = -0.498  # added before OpenCV rounds, so that Pillow's whole numbers stay and its fractions are dropped
_LEVELS = np.arange(256)
_SOLARISED = np.where(_LEVELS < SOLARISE_THRESHOLD, _LEVELS, 255 - _LEVELS).astype(np.uint8)
cv2.setNumThreads(1)  # the loader's threads share the cores already; torch's resize of 8-bit images has but one


def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
    """Make the crops that `jobs` ask for, of (h, w, 3) or (h, w, 1) uint8; see `base.Backend`."""
    if image.strides[1:] != (image.shape[2], 1) or image.strides[0] < 0 or not image.flags.writeable:
        image = image.copy()  # into what torch takes
    for params, interpolation, out in jobs:
        channels, height, width = out.shape
        planes = resized(image, params.box, (height, width), interpolation)
        if params[2:] != NO_COLOURS:
            crop = _coloured(cv2.merge(list(planes)), params)
            cv2.split(cv2.flip(crop, 1) if params.flip else crop, list(out))  # into the arrays that are given to it
        elif params.flip:
            cv2.flip(planes.reshape(channels * height, width), 1, out.reshape(channels * height, width))
        else:
            out[...] = planes


def resized(
    image: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """The box of an (h, w, c) image at `size`: (c, height, width); pixels beyond the box play no part."""
    left, top = math.floor(box[0]), math.floor(box[1])
    region = image[top : math.ceil(box[3]), left : math.ceil(box[2])]
    height, width, channels = region.shape
    if tuple(box) == (left, top, left + width, top + height):
        if (height, width) == size:
            return np.ascontiguousarray(rearrange(region, "h w c -> c h w"))
        if channels == 3 and interpolation != "lanczos":  # torch has no Lanczos filter, and is slow with one channel
            pixels = rearrange(torch.from_numpy(region), "h w c -> 1 c h w")
            return torch.nn.functional.interpolate(pixels, size, mode=interpolation, antialias=True).numpy()[0]
    within = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    pillow = Image.fromarray(region if channels == 3 else region[:, :, 0])
    made = np.asarray(pillow.resize((size[1], size[0]), RESAMPLING[interpolation], within))
    return np.ascontiguousarray(rearrange(made, "h w c -> c h w" if channels == 3 else "h w -> 1 h w"))


def _coloured(crop: np.ndarray, params: CropParams) -> np.ndarray:
    """The operations that follow the resize, on (h, w, 3), or (h, w) for one channel; `crop` may be written to."""
    for name, factor in params.jitter:
        crop = _JITTER[name](crop, factor)
    if params.grayscale and crop.ndim == 3:
        crop = cv2.cvtColor(_luma(crop), cv2.COLOR_GRAY2RGB)
    if params.blur_radius is not None:
        taps = _blur_taps(params.blur_radius)
        crop = cv2.sepFilter2D(crop, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    if params.solarise:
        crop = cv2.LUT(crop, _SOLARISED, crop)
    return crop


def _luma(crop: np.ndarray) -> np.ndarray:
    """(h, w)."""
    return cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY) if crop.ndim == 3 else crop


def _brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(crop, factor, crop, 0, _DROP_FRACTION, crop)


def _contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(_luma(crop))[0] + 0.5)
    return cv2.addWeighted(crop, factor, crop, 0, mean * (1 - factor) + _DROP_FRACTION, crop)


def _saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    if crop.ndim == 2:
        return crop
    grey = cv2.cvtColor(_luma(crop), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(crop, factor, grey, 1 - factor, _DROP_FRACTION, crop)


def _hue(crop: np.ndarray, turns: float) -> np.ndarray:
    """The hue turned in 8-bit HSV. Pillow's has 255 levels, cut, and OpenCV's 256, rounded: a table lies between."""
    if crop.ndim == 2:
        return crop
    turned = (_LEVELS * 255 // 256 + int(turns * 255)) % 256
    table = (np.rint(turned * (256 / 255)) % 256).astype(np.uint8)
    hue, saturation, value = cv2.split(cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL))
    return cv2.cvtColor(cv2.merge([cv2.LUT(hue, table, hue), saturation, value]), cv2.COLOR_HSV2RGB_FULL, crop)


_JITTER: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}


def _blur_taps(deviation: float) -> np.ndarray:
    """Pillow's Gaussian, three passes of a box whose ends count in part (Gwosdek et al. 2011), as one: float32."""
    variance = deviation * deviation / _BLUR_PASSES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.full(2 * whole + 3, 1.0)
    box[0] = box[-1] = part
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box).astype(np.float32)
