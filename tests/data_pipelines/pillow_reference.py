"""The authors' chain of transforms on PIL images, with given parameters: what every backend is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torchvision.transforms.functional as tv
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode

from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.config import Interpolation
from data_pipelines.transforms.params import CropParams

JITTER: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
    """An `Backend` over PIL and torchvision v1; boxes are whole pixels."""
    whole = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image))
    for job in jobs:
        pixels = np.asarray(crop_of(whole, job.params, (job.out.shape[1], job.out.shape[2]), job.interpolation))
        job.out[...] = pixels if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def crop_of(image: Image.Image, params: CropParams, size: tuple[int, int], interpolation: Interpolation) -> Image.Image:
    left, top, right, bottom = (int(side) for side in params.box)
    mode = InterpolationMode[interpolation.upper()]
    image = tv.resized_crop(image, top, left, bottom - top, right - left, list(size), mode)
    image = tv.hflip(image) if params.flip else image
    for name, factor in params.jitter:
        image = JITTER[name](image, factor)
    if params.grayscale:
        image = tv.to_grayscale(image, len(image.getbands()))
    if params.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(params.blur_radius))
    return ImageOps.solarize(image) if params.solarise else image
