"""Raw pixels of patches as tokens, and masks only where a probe needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from making import encode, picture, write_tar

from data_pipelines.datasets.dataset import Dataset, open_dataset
from eval.dense import PixelTokens, maps_for, pixel_tokens
from eval.protocol import Protocol


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    files = []
    for number in range(5):
        files.append((f"{number}.png", encode(picture(number, 48, 48))))
        files.append((f"{number}.mask.png", encode(picture(number, 48, 48)[..., 0] // 100)))
    write_tar(tmp_path / "train-000000.tar", files)
    return open_dataset(tmp_path)


def test_tokens_are_the_pixels_of_patches(dataset: Dataset) -> None:
    tokens = PixelTokens(dataset, torch.tensor([4, 0, 2]), 48, (4, 3))
    assert (len(tokens), tokens.dim) == (3, 3 * 12 * 16)
    found = tokens[torch.tensor([0, 2])]
    for patches, number in zip(found, (4, 2), strict=True):
        for place in range(12):
            row, column = divmod(place, 3)
            expected = picture(number, 48, 48)[12 * row : 12 * row + 12, 16 * column : 16 * column + 16] / 255
            np.testing.assert_allclose(patches[place].view(3, 12, 16).numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    assert tokens[torch.empty(0, dtype=torch.int64)].shape == (0, 12, tokens.dim)


def test_large_patches_are_averaged_and_the_mean_of_train_is_taken_away(dataset: Dataset) -> None:
    ids = torch.arange(5)
    whole = PixelTokens(dataset, ids, 48, (1, 1))
    assert whole.dim == 3 * 16 * 16
    assert whole[ids[:1]][0, 0, 0] == pytest.approx(picture(0, 48, 48)[:3, :3, 0].mean() / 255)
    train, val = pixel_tokens((dataset, ids), (dataset, ids[:2]), 48, (4, 4), 3, 8)
    assert train[ids].mean(dim=(0, 1)).abs().max() < 1e-6
    torch.testing.assert_close(val[ids[:2]], train[ids[:2]])
    with pytest.raises(ValueError, match="48 px do not divide into 5x4 patches"):
        PixelTokens(dataset, ids, 48, (4, 5))


def test_masks_are_given_where_a_probe_needs_them(dataset: Dataset) -> None:
    found = {also: Protocol.of((), (0,), {}, only=(also,)) for also in ("segmentation", "depth", "knn")}
    assert {also: list(maps_for(protocol, dataset, torch.arange(5), 48)) for also, protocol in found.items()} == {
        "segmentation": ["masks"],
        "depth": ["depths"],
        "knn": [],
    }
    masks = maps_for(found["segmentation"], dataset, torch.tensor([3, 1]), 48)["masks"]
    assert torch.equal(masks[torch.tensor([1])][0], torch.from_numpy(picture(1, 48, 48)[..., 0] // 100).long())
