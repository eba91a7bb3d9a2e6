"""Centre crops: the probe's protocol, in order, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from making import encode, picture, write_tar
from PIL import Image
from torchvision.transforms import InterpolationMode

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.eval_loader import center_crop, center_crops


@pytest.mark.parametrize(("height", "width"), [(60, 80), (83, 41), (20, 24), (33, 33)])
def test_equal_to_torchvision(height: int, width: int) -> None:
    image = Image.fromarray(picture(0, height, width))
    expected = tv.center_crop(tv.resize(image, [37], InterpolationMode.BICUBIC), [32])  # 32 * 256 / 224 = 36.6
    np.testing.assert_array_equal(np.asarray(center_crop(image, 32)), np.asarray(expected))


def test_an_image_of_the_size_is_taken_whole() -> None:
    image = Image.fromarray(picture(0, 32, 32))
    assert center_crop(image, 32) is image
    assert center_crop(image, 32, resize=40).size == (32, 32)
    with pytest.raises(ValueError, match="as large at least"):
        center_crop(image, 32, resize=31)


def test_in_order_and_every_sample_once(dataset: Dataset) -> None:
    whole = list(center_crops(dataset, 16, batch_size=20, threads=3))
    assert [len(images) for images, _, _ in whole] == [20, 20, 10]
    images, labels, samples = (torch.cat(parts) for parts in zip(*whole, strict=True))
    assert samples.tolist() == list(range(50))
    assert labels.tolist() == [sample % 10 for sample in range(50)]
    assert images.shape == (50, 3, 16, 16)
    assert images.dtype == torch.uint8
    ranks = [batch for rank in range(3) for batch in center_crops(dataset, 16, rank=rank, world_size=3)]
    assert torch.equal(torch.cat([images for images, _, _ in ranks]), images)


def test_chosen_samples_in_the_order_given(dataset: Dataset) -> None:
    chosen = [41, 3, 17, 3]
    whole = torch.cat([images for images, _, _ in center_crops(dataset, 16)])
    batches = list(center_crops(dataset, 16, batch_size=3, samples=chosen))
    assert [samples.tolist() for _, _, samples in batches] == [chosen[:3], chosen[3:]]
    assert torch.equal(torch.cat([images for images, _, _ in batches]), whole[chosen])
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [1, 3, 7, 3]


def test_bad_samples_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [(f"{number}.png", encode(picture(number))[: 60 if number == 2 else None]) for number in range(5)]
    write_tar(tmp_path / "val-0.tar", files)
    ((_, labels, samples),) = center_crops(open_dataset(tmp_path, "val"), 16, channels=1)
    assert samples.tolist() == [0, 1, 3, 4]
    assert labels.tolist() == [-1] * 4
    assert "sample 2 of" in caplog.text
