"""Masks in batches: cut where the images are cut, whoever makes the crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making import encode, write_tar

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.images.maps import BadMapError
from data_pipelines.loader import Loader
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, Views
from data_pipelines.transforms.map_crops import IGNORED, cut_mask
from data_pipelines.transforms.params import CropParams


def shapes(seed: int, height: int = 60, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """An image of a bright box and a dark one on grey, and its mask: 3 and 7 on 0, the lowest rows not judged."""
    image, mask = np.full((height, width, 3), 128, np.uint8), np.zeros((height, width), np.uint8)
    rng = np.random.default_rng(seed)
    for level, colour in ((3, 250), (7, 5)):
        top, left = rng.integers(0, height - 30), rng.integers(0, width - 35)
        image[top : top + 30, left : left + 35], mask[top : top + 30, left : left + 35] = colour, level
    mask[-6:] = 255
    return image, mask


def shards(folder: Path, masks: bool = True) -> Path:
    files = []
    for number in range(8):
        image, mask = shapes(number)
        files += [(f"{number}.png", encode(image))] + ([(f"{number}.mask.png", encode(mask))] if masks else [])
    write_tar(folder / "train-000000.tar", files)
    return folder


def loader(folder: Path, workers: int = 0) -> Loader:
    sampler = Sampler([open_dataset(folder)], weights=[1.0], names=["x"], seed=1, batch_size=4, repeats=2)
    views = Views(global_crops=(Crop(size=(24, 32), scale=(0.3, 1.0), interpolation="bilinear"),))
    return Loader(sampler, views, masks=True, workers=workers, threads=1)


def test_a_mask_is_cut_as_its_image(tmp_path: Path) -> None:
    with loader(shards(tmp_path)) as made:
        for step in range(4):
            batch = made.rows(step, range(4))
            grey, masks = batch["global_crops"][:, 0, 0].numpy().astype(int), batch["masks"].numpy()
            assert masks.dtype == np.int32
            assert set(np.unique(masks)) <= {IGNORED, 0, 3, 7}
            told = np.select([grey > 190, grey < 66], [3, 7], 0)
            judged = masks != IGNORED
            assert (told == masks)[judged].mean() > 0.95  # what is between two of the image's pixels is a mixture


def test_a_mask_of_part_of_an_image() -> None:
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
    mask[3, 3] = 255
    out = np.empty((2, 2), np.int32)
    cut_mask(mask, CropParams((1.0, 1.0, 3.0, 3.0)), out)
    assert out.tolist() == [[5, 6], [9, 10]]
    cut_mask(mask, CropParams((2.0, 2.0, 4.0, 4.0), flip=True), out)
    assert out.tolist() == [[11, 10], [IGNORED, 14]]
    cut_mask(mask, CropParams((0.0, 0.0, 4.0, 4.0)), out)
    assert out.tolist() == [[5, 7], [13, IGNORED]]


def test_a_missing_mask_is_told(tmp_path: Path) -> None:
    with loader(shards(tmp_path, masks=False)) as made, pytest.raises(BadMapError, match="has no mask"):
        made.rows(0, range(4))
