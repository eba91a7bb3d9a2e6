"""Masks are cropped as their images are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from making import deep_png, encode, npy, write_tar
from PIL import Image

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.eval_loader import center_crop, center_crops
from data_pipelines.eval_maps import IGNORED, CenterMaps, cropped_map
from data_pipelines.images.maps import BadMapError

SIZES = [(20, 24), (37, 16), (16, 16), (50, 40), (16, 90)]


def mask_of(number: int) -> np.ndarray:
    height, width = SIZES[number]
    return np.random.default_rng(number).integers(0, 2, (height, width)).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    files = []
    for number in range(len(SIZES)):
        mask = mask_of(number)
        files.append((f"{number}.png", encode(np.dstack([mask * np.uint8(255)] * 3))))
        files.append((f"{number}.mask.png", encode(mask) if number else deep_png(mask.astype(np.uint16) * 65535)))
        files.append((f"{number}.depth.npy", npy(mask + 0.5)))
    write_tar(tmp_path / "train-000000.tar", files)
    return open_dataset(tmp_path)


@pytest.mark.parametrize("resize", [None, 16, 23])
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_the_geometry_is_that_of_the_images(number: int, resize: int | None) -> None:
    """Of smooth pictures of rows and columns the crop of the picture is near that of the map."""
    height, width = SIZES[number]
    for ramp in np.mgrid[:height, :width]:
        levels = (ramp * (255 / max(height, width))).astype(np.float32)
        whole = center_crop(Image.fromarray(levels), 16, resize)
        step = 255 / max(height, width)
        assert np.abs(np.asarray(whole) - cropped_map(levels, 16, resize)).max() <= max(1.01 * step, 1)


def test_masks_in_any_order_with_what_is_not_to_be_judged(dataset: Dataset) -> None:
    found = CenterMaps(dataset, range(len(SIZES)), 16, threads=2)
    assert found[:].shape == (5, 16, 16)
    rows = torch.tensor([3, 0, 2])
    assert found[rows].dtype == torch.int64
    for mask, number in zip(found[rows], rows.tolist(), strict=True):
        expected = cropped_map(mask_of(number), 16).astype(np.int64)
        np.testing.assert_array_equal(mask, expected if number else np.where(expected == 1, IGNORED, 0))
    chosen = CenterMaps(dataset, [4, 2], 16, kind="depth")
    np.testing.assert_array_equal(chosen[[1]][0], cropped_map(mask_of(2) + np.float32(0.5), 16))
    assert found[torch.empty(0, dtype=torch.int64)].shape == (0, 16, 16)


def test_they_fit_the_pixels_of_the_crops(dataset: Dataset) -> None:
    """Of the image that is taken whole, exactly: its pixels are its mask's."""
    images, _, ids = next(center_crops(dataset, 16, threads=1))
    place = ids.tolist().index(2)
    assert (images[place, 0].float() / 255 == CenterMaps(dataset, ids, 16)[[place]][0]).all()


def test_without_masks_or_with_bad_ones_the_samples_are_named(tmp_path: Path) -> None:
    image = encode(np.zeros((20, 20, 3), np.uint8))
    write_tar(tmp_path / "train-000000.tar", [("a.png", image), ("b.png", image), ("b.mask.png", encode(mask_of(0)))])
    with open_dataset(tmp_path) as dataset:
        assert CenterMaps(dataset, [0, 1], 16).rows.tolist() == [1]
        assert CenterMaps(dataset, [0, 1], 16, kind="depth").rows.tolist() == []
        with pytest.raises(BadMapError, match=r"sample a of .*has no mask.*--masks"):
            CenterMaps(dataset, [0, 1], 16)[:]
        with pytest.raises(BadMapError, match="24x20 px and its image 20x20"):
            CenterMaps(dataset, [1], 16)[:]
