"""Crops without a compiler: the executor that needs installed wheels only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data_pipelines import any_channels
from data_pipelines.crops import SOLARISE_THRESHOLD, CropJob, to_pillow, write_channels
from data_pipelines.draws import CropParams
from data_pipelines.views import Interpolation

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
    """Make the crops that `jobs` ask for; see `crops.Executor`."""
    if not any_channels.is_plain(image):
        return any_channels.render(image, jobs)
    whole = to_pillow(image)
    for job in jobs:
        _render(whole, job.params, job.interpolation, job.out)


def _render(image: Image.Image, params: CropParams, interpolation: Interpolation, out: np.ndarray) -> None:
    left, top, right, bottom = params.box
    x, y = math.floor(left), math.floor(top)
    crop = image.crop((x, y, math.ceil(right), math.ceil(bottom)))  # Pillow's resize reads beyond its own box
    box = (left - x, top - y, right - x, bottom - y)
    crop = crop.resize((out.shape[2], out.shape[1]), RESAMPLING[interpolation], box=box)
    if params.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, factor in params.jitter:
        crop = _JITTER[name](crop, factor)
    if params.grey and crop.mode == "RGB":
        grey = crop.convert("L")
        crop = Image.merge("RGB", (grey, grey, grey))
    if params.blur_radius is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(params.blur_radius))
    if params.solarise:
        crop = ImageOps.solarize(crop, SOLARISE_THRESHOLD)
    write_channels(crop, out)


def _hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn the hue in 8-bit HSV, as torchvision does on PIL images."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turns * 255) % 256
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_JITTER = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": _hue,
}
