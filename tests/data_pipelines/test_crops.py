"""Crops equal, to the pixel, torchvision's transforms on PIL images with the same parameters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torchvision.transforms.functional as tv
from making import picture
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode

from data_pipelines.crops import CropJob, render
from data_pipelines.draws import CropParams, draw_crop
from data_pipelines.streams import Stream
from data_pipelines.views import Crop, Interpolation

PIXELS = picture(3, 60, 80)
IMAGE = Image.fromarray(PIXELS)
WHOLE = (0, 0, 80, 60)
JITTER: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


def rendered(
    params: CropParams,
    size: tuple[int, int] = (60, 80),
    interpolation: Interpolation = "bicubic",
    image: np.ndarray = PIXELS,
) -> np.ndarray:
    """(h, w, c), or (h, w) for one channel."""
    out = np.full((image.shape[2], *size), 77, dtype=np.uint8)
    render(image, [CropJob(params, interpolation, out)])
    return np.moveaxis(out, 0, -1).squeeze()


def authors(params: CropParams, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """The authors' chain of transforms with given parameters."""
    left, top, right, bottom = params.box
    mode = InterpolationMode[interpolation.upper()]
    image = tv.resized_crop(IMAGE, top, left, bottom - top, right - left, list(size), mode)
    image = tv.hflip(image) if params.flip else image
    for name, factor in params.jitter:
        image = JITTER[name](image, factor)
    image = tv.to_grayscale(image, 3) if params.grey else image
    if params.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(params.blur_radius))
    image = ImageOps.solarize(image) if params.solarise else image
    return np.asarray(image)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("number", range(20))
def test_everything_at_once_equals_torchvision(number: int, interpolation: Interpolation) -> None:
    crop = Crop(size=(24, 32), jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarise=0.3)
    params = draw_crop(crop, Stream(number), (60, 80))
    np.testing.assert_array_equal(rendered(params, crop.size, interpolation), authors(params, crop.size, interpolation))


@pytest.mark.parametrize(
    ("name", "factor"),
    [(name, factor) for name in ("brightness", "contrast", "saturation") for factor in (0.0, 0.3, 1.0, 1.4)]
    + [("hue", turns) for turns in (-0.5, -0.1, 0.0, 0.07, 0.5)],
)
def test_each_jitter_equals_torchvision(name: str, factor: float) -> None:
    expected = np.asarray(JITTER[name](IMAGE, factor))
    np.testing.assert_array_equal(rendered(CropParams(WHOLE, jitter=((name, factor),))), expected)


def test_jitter_runs_in_the_drawn_order() -> None:
    steps = (("brightness", 1.4), ("contrast", 0.6))
    there, back = (rendered(CropParams(WHOLE, jitter=order)) for order in (steps, steps[::-1]))
    assert not np.array_equal(there, back)


def test_nothing_to_do_is_a_copy() -> None:
    np.testing.assert_array_equal(rendered(CropParams(WHOLE)), np.asarray(IMAGE))
    np.testing.assert_array_equal(rendered(CropParams(WHOLE, flip=True)), np.asarray(IMAGE)[:, ::-1])


def test_the_target_crop_shows_the_same_region() -> None:
    """BEiT's second view: 8 by 8 means of it agree with the encoder's view at twice the size."""
    params = CropParams((10, 5, 60, 55), flip=True, jitter=(("brightness", 1.2),))
    large, small = rendered(params, (32, 32)), rendered(params, (16, 16), "lanczos")
    pooled = large.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(pooled - small).mean() < 2


def test_greyscale() -> None:
    params = CropParams(
        (3, 4, 50, 50), jitter=(("brightness", 1.2), ("contrast", 0.7)), grey=True, blur_radius=1.0, solarise=True
    )
    assert rendered(params, (16, 16), image=PIXELS[:, :, :1]).shape == (16, 16)
