"""Colour in batches is Pillow's colour of each crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from making import picture
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tv

from data_pipelines.rng import Stream
from data_pipelines.transforms.backends.colours import NUM_COLOURS, write_colours
from data_pipelines.transforms.backends.device import apply_colours
from data_pipelines.transforms.config import Crop
from data_pipelines.transforms.params import CropParams, draw_crop

BOX = (0, 0, 1, 1)
JITTER = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


def pillow(crop: np.ndarray, params: CropParams) -> np.ndarray:
    """The authors' operations on one crop, (c, h, w)."""
    image = Image.fromarray(crop[0] if len(crop) == 1 else np.moveaxis(crop, 0, -1))
    for name, factor in params.jitter:
        image = JITTER[name](image, factor)
    if params.grayscale:
        image = tv.to_grayscale(image, len(crop))
    if params.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(params.blur_radius))
    if params.solarise:
        image = ImageOps.solarize(image)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def crops(count: int, height: int = 40, width: int = 48, channels: int = 3) -> np.ndarray:
    """(count, channels, height, width) uint8: smooth with noise, and the last one of noise alone."""
    rng = np.random.default_rng(0)
    smooth = np.stack([picture(seed, height, width) for seed in range(count)]).astype(float)
    smooth[-1] = 127
    noise = rng.normal(0, 1, smooth.shape) * np.where(np.arange(count) == count - 1, 90, 10)[:, None, None, None]
    pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 1)[:, :channels])


def applied(pixels: np.ndarray, params: list[CropParams]) -> np.ndarray:
    colours = np.zeros((len(params), NUM_COLOURS), dtype=np.float32)
    for drawn, row in zip(params, colours, strict=True):
        write_colours(drawn, row)
    return apply_colours(torch.from_numpy(pixels), torch.from_numpy(colours)).numpy()


def psnr(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Decibels of each crop."""
    error = ((ours.astype(float) - theirs.astype(float)) ** 2).reshape(len(ours), -1).mean(axis=1)
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


@pytest.mark.parametrize(
    "params",
    [
        *(
            CropParams(BOX, jitter=((name, factor),))
            for name in ("brightness", "contrast", "saturation")
            for factor in (0.0, 0.3, 1.0, 1.4, 2.0)
        ),
        CropParams(BOX, grayscale=True),
        CropParams(BOX, solarise=True),
    ],
)
def test_exact_operations(params: CropParams) -> None:
    pixels = crops(4)
    np.testing.assert_array_equal(applied(pixels, [params] * 4), np.stack([pillow(crop, params) for crop in pixels]))


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 1.7, 2.0, 5.3])
def test_blur_to_a_level(radius: float) -> None:
    for shape in ((40, 48), (7, 5), (1, 1)):
        pixels, params = crops(3, *shape), CropParams(BOX, blur_radius=radius)
        theirs = np.stack([pillow(crop, params) for crop in pixels])
        ours = applied(pixels, [params] * 3)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        assert (ours != theirs).mean() < 0.001


@pytest.mark.parametrize("turns", [-0.5, -0.2, -0.01, 0.0, 0.003, 0.1, 0.5])
def test_every_hue(turns: float) -> None:
    """All colours on a grid of 32 levels a channel."""
    levels = np.linspace(0, 255, 32).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 128, 256)
    params = CropParams(BOX, jitter=(("hue", turns),))
    ours, theirs = applied(grid, [params]), pillow(grid[0], params)[None]
    assert (ours != theirs).any(axis=1).mean() < 0.01  # a hue on the edge of two levels
    assert psnr(ours, theirs)[0] > 55


def test_all_together_each_in_its_own_order() -> None:
    crop = Crop(size=8, jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2, blur=0.5, solarise=0.2)
    params = [draw_crop(crop, Stream(number), (50, 50)) for number in range(300)]
    pixels = crops(300)
    before = pixels.copy()
    decibels = psnr(applied(pixels, params), np.stack([pillow(*pair) for pair in zip(pixels, params, strict=True)]))
    np.testing.assert_array_equal(pixels, before)
    assert np.median(decibels) > 60
    assert np.percentile(decibels, 5) > 50


def test_greyscale() -> None:
    crop = Crop(size=8, jitter=(0.4, 0.4, 0, 0), blur=0.5, solarise=0.5, grayscale=0.5)
    params = [draw_crop(crop, Stream(number), (50, 50)) for number in range(30)]
    pixels = crops(30, channels=1)
    theirs = np.stack([pillow(*pair) for pair in zip(pixels, params, strict=True)])
    assert np.abs(applied(pixels, params).astype(int) - theirs).max() <= 1


def test_memory_is_not_shared_with_the_crops() -> None:
    pixels = torch.from_numpy(crops(2))
    nothing = np.zeros((2, NUM_COLOURS), dtype=np.float32)
    for row in nothing:
        write_colours(CropParams(BOX), row)
    done: Tensor = apply_colours(pixels, torch.from_numpy(nothing))
    assert torch.equal(done, pixels)
    assert done.data_ptr() != pixels.data_ptr()
