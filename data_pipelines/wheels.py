"""Crops without a compiler: torch's antialiased resize, OpenCV's loops, and Pillow for what those two have not.

The operations are Pillow's, in its order and with its clamping. Sums are rounded where Pillow rounds, but for the passes
of the blur, which are one here, and hue, which is computed in floating point and cut to Pillow's 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import cv2
import numpy as np
import torch
from einops import rearrange
from PIL import Image

from data_pipelines.crops import SOLARISE_THRESHOLD, CropJob
from data_pipelines.draws import CropParams
from data_pipelines.views import Interpolation

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_BLUR_PASSES = 3
_LEVELS = np.arange(256, dtype=np.float32)
_SOLARISED = np.where(np.arange(256) < SOLARISE_THRESHOLD, np.arange(256), 255 - np.arange(256)).astype(np.uint8)
_ABOVE_A_HALF = 0.498  # taken off what is then rounded, a fraction is dropped; whole numbers stay


def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
    """Make the crops that `jobs` ask for; see `crops.Executor`."""
    if image.strides[1:] != (image.shape[2] * image.itemsize, image.itemsize):
        image = np.ascontiguousarray(image)
    for job in jobs:
        crop = resized(image, job.params.box, (job.out.shape[1], job.out.shape[2]), job.interpolation)
        crop = _coloured(crop, job.params)
        if job.params.flip:
            crop = crop[:, ::-1] if crop.dtype != np.uint8 else cv2.flip(crop, 1).reshape(crop.shape)
        _write(crop, job.out)


def resized(
    image: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """The box of an (h, w, c) image at (height, width) `size`; pixels outside of the box play no part.

    Any number of channels, of any type that Pillow resizes: uint8, uint16, float32.
    """
    left, top, right, bottom = box
    first_column, first_row = math.floor(left), math.floor(top)
    region = image[first_row : math.ceil(bottom), first_column : math.ceil(right)]
    whole_pixels = (first_column, first_row, first_column + region.shape[1], first_row + region.shape[0]) == tuple(box)
    if region.shape[:2] == size and whole_pixels:
        return np.ascontiguousarray(region)
    if image.dtype == np.uint8 and image.shape[2] == 3 and whole_pixels and interpolation != "lanczos":
        # a batch of one, so that torch sees channels last and answers in kind
        pixels = rearrange(torch.from_numpy(region[np.newaxis]), "b h w c -> b c h w")
        out = torch.nn.functional.interpolate(pixels, size, mode=interpolation, antialias=True)
        return np.ascontiguousarray(rearrange(out, "1 c h w -> h w c").numpy())
    inner = (left - first_column, top - first_row, right - first_column, bottom - first_row)
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(region).resize(size[::-1], RESAMPLING[interpolation], inner))
    channels = [
        np.asarray(Image.fromarray(region[:, :, channel]).resize(size[::-1], RESAMPLING[interpolation], inner))
        for channel in range(image.shape[2])
    ]
    return np.stack(channels, axis=2)


def _write(crop: np.ndarray, out: np.ndarray) -> None:
    """(h, w, c) into (c, h, w)."""
    if crop.shape[2] == 3 and crop.dtype == np.uint8:
        cv2.split(crop, list(out))  # ten times as fast as NumPy; writes into the planes it is given
    else:
        out[...] = rearrange(crop, "h w c -> c h w")


def _coloured(crop: np.ndarray, params: CropParams) -> np.ndarray:
    """The operations that follow the resize, on (h, w, 3) or (h, w, 1) uint8."""
    is_rgb = crop.shape[2] == 3
    for name, factor in params.jitter:
        if is_rgb or name in ("brightness", "contrast"):
            crop = _JITTER[name](crop, factor)
    if params.grey and is_rgb:
        crop = cv2.cvtColor(_luma(crop), cv2.COLOR_GRAY2RGB)
    if params.blur_radius is not None:
        taps = _blur_taps(params.blur_radius)
        blurred = cv2.sepFilter2D(crop, cv2.CV_32F, taps, taps, borderType=cv2.BORDER_REPLICATE)
        crop = cv2.convertScaleAbs(blurred).reshape(crop.shape)
    if params.solarise:
        crop = cv2.LUT(crop, _SOLARISED).reshape(crop.shape)
    return crop


def _luma(crop: np.ndarray) -> np.ndarray:
    """(h, w)."""
    return cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY) if crop.shape[2] == 3 else crop[:, :, 0]


def _towards(crop: np.ndarray, base: float, factor: float) -> np.ndarray:
    table = np.float32(base) + np.float32(factor) * (_LEVELS - np.float32(base))
    return cv2.LUT(crop, table.clip(0, 255).astype(np.uint8)).reshape(crop.shape)


def _brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return _towards(crop, 0, factor)


def _contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    return _towards(crop, int(cv2.mean(_luma(crop))[0] + 0.5), factor)


def _saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(_luma(crop), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(crop, factor, grey, 1 - factor, -_ABOVE_A_HALF)


def _hue(crop: np.ndarray, turns: float) -> np.ndarray:
    """The hue turned in HSV of 8 bits each, as Pillow cuts them."""
    hue, saturation, value = cv2.split(cv2.cvtColor(crop.astype(np.float32), cv2.COLOR_RGB2HSV))
    hue *= 255 / 360
    hue += 5e-4  # exact steps of hue must not fall below themselves; others lie a 510th apart at least
    saturation *= 255
    saturation += 5e-4
    shift = int(turns * 255) % 256
    degrees = np.roll(_LEVELS * np.float32(360 / 255), -shift)
    hue, saturation = cv2.LUT(hue.astype(np.uint8), degrees), saturation.astype(np.uint8) * np.float32(1 / 255)
    return cv2.convertScaleAbs(cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB))


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
