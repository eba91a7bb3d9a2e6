"""Parameters and an image make crops: the executor that needs Pillow only.

Every operation is the one the authors' recipes run (torchvision's transforms on PIL images), so the pixels
are theirs. A faster executor has the same one function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data_pipelines import any_channels
from data_pipelines.any_channels import RESAMPLING
from data_pipelines.draws import CropParams
from data_pipelines.views import Interpolation

SOLARISE_THRESHOLD = 128


class CropJob(NamedTuple):
    """One crop to be made of an image."""

    params: CropParams  # what to do, box in px of the image
    interpolation: Interpolation  # of the resize, with antialiasing
    out: np.ndarray  # (c, height, width) of the image's type, written to


#: Makes crops of one image, (h, w, c) uint8 or uint16 of any strides; called by many threads at once.
Executor = Callable[[np.ndarray, Sequence[CropJob]], None]


def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
    """Make the crops that `jobs` ask for; see `Executor`."""
    if not any_channels.is_plain(image):
        return any_channels.render(image, jobs)
    whole = to_pillow(image)
    for job in jobs:
        _render(whole, job.params, job.interpolation, job.out)


def to_pillow(image: np.ndarray) -> Image.Image:
    """(h, w, c) uint8 as mode RGB, or L for one channel."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _render(image: Image.Image, params: CropParams, interpolation: Interpolation, out: np.ndarray) -> None:
    crop = resized_crop(image, params.box, (out.shape[1], out.shape[2]), interpolation)
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


def resized_crop(
    image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: Interpolation
) -> Image.Image:
    """Cut `box` out and resize it to (height, width); the pixels outside of the box play no part."""
    if box != (0, 0, *image.size):
        image = image.crop(box)
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), RESAMPLING[interpolation])


def write_channels(image: Image.Image, out: np.ndarray) -> None:
    """Copy an RGB or L image into `out`, (c, h, w) uint8."""
    pixels = np.asarray(image)
    out[...] = pixels if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")


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
