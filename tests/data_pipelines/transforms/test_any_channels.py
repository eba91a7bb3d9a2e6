"""Crops of any channels and of 16 bits: Pillow's on RGB, slow formulas on others, the same from any threads."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from making import bands, npy, picture, tiff, write_tar
from PIL import Image

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.eval_loader import center_crops
from data_pipelines.loader import Loader
from data_pipelines.rng import Stream
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.backends import opencv
from data_pipelines.transforms.backends.any_channels import RESAMPLING, fitting, left_out_line, render
from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.config import Crop, Interpolation, LocalCrops, TargetCrop, Views
from data_pipelines.transforms.params import CropParams, draw_crop

COLOUR = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
DINO = Views(
    global_crops=(Crop(size=16, blur=1.0, **COLOUR), Crop(size=16, blur=0.1, solarise=0.2, **COLOUR)),
    local_crops=LocalCrops(size=8, count=3, scale=(0.05, 0.4), blur=0.5, **COLOUR),
    target_crop=TargetCrop(size=8),
)
BANDS = bands(1, 13, 60, 80)
PHOTO = picture(3, 60, 80)
WHOLE = (0, 0, 80, 60)


def rendered(
    image: np.ndarray, params: CropParams, size: tuple[int, int] = (32, 32), interpolation: Interpolation = "bicubic"
) -> np.ndarray:
    out = np.zeros((image.shape[2], *size), dtype=image.dtype)
    render(image, [CropJob(params, interpolation, out)])
    return out


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    full = np.iinfo(expected.dtype).max
    error = np.mean((found.astype(float) - expected.astype(float)) ** 2)
    return float(10 * np.log10(full**2 / max(error, 1e-12)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(32, 32), (10, 7), (90, 100)])
def test_resizing_is_pillows(interpolation: Interpolation, size: tuple[int, int]) -> None:
    params = CropParams((5, 3, 70, 55), flip=True)
    image = Image.fromarray(PHOTO).crop(params.box).resize((size[1], size[0]), RESAMPLING[interpolation])
    expected = np.moveaxis(np.asarray(image)[:, ::-1], 2, 0)
    assert psnr(rendered(PHOTO, params, size, interpolation), expected) > 50
    wide = rendered(PHOTO.astype(np.uint16) * 257, params, size, interpolation)
    assert psnr(wide, expected.astype(np.uint16) * 257) > 50


def test_all_operations_are_pillows_on_rgb() -> None:
    crop = Crop(size=32, blur=0.5, solarise=0.3, **COLOUR)
    quality = []
    for number in range(60):
        photo = picture(number, 60, 80)
        params = draw_crop(crop, Stream(number), (60, 80))
        expected = np.zeros((3, 32, 32), dtype=np.uint8)
        opencv.render(photo, [CropJob(params, "bicubic", expected)])
        wide = rendered(photo.astype(np.uint16) * np.uint16(257), params)
        quality.append(psnr((wide >> 8).astype(np.uint8), expected))
    assert np.median(quality) > 40
    assert np.percentile(quality, 5) > 32


def test_each_channel_is_treated_alone() -> None:
    """A crop of 13 channels is the crops of each, and of one channel the slow formulas."""
    params = CropParams((3, 4, 70, 50), jitter=(("contrast", 1.5), ("brightness", 0.7)), blur_radius=1.2, solarise=True)
    together = rendered(BANDS, params)
    for band in range(13):
        np.testing.assert_array_equal(together[band], rendered(BANDS[:, :, band : band + 1], params)[0])
    plain = rendered(BANDS, CropParams((3, 4, 70, 50)))[0].astype(float)
    bright = rendered(BANDS, CropParams((3, 4, 70, 50), jitter=(("brightness", 1.4),)))[0]
    np.testing.assert_allclose(bright, np.minimum(plain * 1.4, 65535), atol=2)
    contrast = rendered(BANDS, CropParams((3, 4, 70, 50), jitter=(("contrast", 0.5),)))[0]
    np.testing.assert_allclose(contrast, plain.mean() + 0.5 * (plain - plain.mean()), atol=2)
    inverted = rendered(BANDS, CropParams((3, 4, 70, 50), solarise=True))[0]
    np.testing.assert_allclose(inverted, np.where(plain >= 32768, 65535 - plain, plain), atol=1)


def test_nothing_leaves_the_range() -> None:
    edges = np.zeros((40, 40, 5), dtype=np.uint16)
    edges[:, 20:] = 65535
    for interpolation in ("bicubic", "lanczos"):
        found = rendered(edges, CropParams((0, 0, 40, 40)), (90, 90), interpolation)
        assert found[:, :, :30].max() < 3000  # an overshoot that wrapped around would be white
        assert found[:, :, 60:].min() > 62000
    found = rendered(edges, CropParams((0, 0, 40, 40), jitter=(("brightness", 3.0), ("contrast", 3.0))))
    assert set(np.unique(found[:, :, :10])) == {0}
    assert set(np.unique(found[:, :, 22:])) == {65535}


def test_the_smallest_images() -> None:
    for shape in ((1, 1), (1, 9), (7, 1)):
        image = bands(2, 4, *shape)
        found = rendered(image, CropParams((0, 0, shape[1], shape[0]), blur_radius=2.0), (6, 6), "lanczos")
        assert found.shape == (4, 6, 6)


def test_what_needs_colours_is_left_out_and_named() -> None:
    views, names = fitting(DINO, 13)
    assert names == ("saturation", "hue", "grayscale")
    crop, local = views.global_crops[1], views.local_crops
    assert (crop.jitter, crop.grayscale, crop.solarise) == ((0.4, 0.4, 0, 0), 0, 0.2)
    assert local is not None
    assert (local.jitter, local.grayscale, local.count) == ((0.4, 0.4, 0, 0), 0, 3)
    assert views.target_crop == DINO.target_crop
    assert left_out_line(DINO, 1) == [
        "left out of views: saturation, hue, grayscale, which need RGB; images of 1 channel have no colours"
    ]
    assert fitting(DINO, 3) == (DINO, ())
    assert not left_out_line(DINO, 3)
    assert not left_out_line(Views(global_crops=(Crop(size=8, jitter=(0.2, 0.2, 0, 0)),)), 13)


@pytest.fixture
def multispectral(tmp_path: Path) -> Dataset:
    """24 images of 13 bands, every other one as TIFF and `.npy`."""
    files = []
    for number in range(24):
        pixels = bands(number)
        content, suffix = npy(pixels), "npy"
        if number % 2 == 0:
            content, suffix = tiff(pixels, planarconfig="contig", compression="zlib"), "tif"
        files += [(f"{number:06d}.{suffix}", content), (f"{number:06d}.cls", str(number % 3).encode())]
    write_tar(tmp_path / "train-000000.tar", files)
    return open_dataset(tmp_path)


def digests(dataset: Dataset, ranks: int, threads: int, start: int = 0) -> list[str]:
    loaders = [
        Loader(
            Sampler((dataset,), seed=7, batch_size=12), DINO, rank=rank, world_size=ranks, threads=threads,
            channels=13, bits=16,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    found = []
    for parts in itertools.islice(zip(*(loader.steps(start) for loader in loaders), strict=True), 20 - start):
        hashed = hashlib.sha256()
        for name in ("ids", "global_crops", "local_crops", "target_crops"):
            whole = torch.cat([batch[name] for micro_batches in parts for batch in micro_batches])
            assert name == "ids" or (whole.dtype == torch.uint16 and whole.shape[-3] == 13)
            hashed.update(whole.numpy().tobytes())
        found.append(hashed.hexdigest())
    for loader in loaders:
        loader.close()
    return found


def test_13_bands_are_the_same_from_any_threads_ranks_and_start(multispectral: Dataset) -> None:
    reference = digests(multispectral, 1, 1)
    assert len(set(reference)) == 20
    for ranks, threads, start in ((1, 3, 0), (2, 2, 0), (3, 1, 7)):
        assert digests(multispectral, ranks, threads, start) == reference[start:]


def test_center_crops_of_13_bands(multispectral: Dataset) -> None:
    (images, labels, numbers), *_ = list(center_crops(multispectral, 16, channels=13, bits=16))
    assert images.dtype == torch.uint16
    assert (images.shape, labels.tolist()[:4], len(numbers)) == ((24, 13, 16, 16), [0, 1, 2, 0], 24)
    plane = Image.fromarray(bands(5)[:, :, 7].astype(np.float32)).resize((21, 18), Image.Resampling.BICUBIC)
    expected = np.asarray(plane)[1:17, 2:18]
    np.testing.assert_allclose(images[5, 7].numpy(), expected.clip(0, 65535), atol=1)
