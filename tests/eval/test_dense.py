"""Raw pixels of patches as tokens, and masks only where a probe needs them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from making import encode, picture, write_tar
from rich.console import Console

from data_pipelines.datasets.dataset import Dataset, open_dataset
from eval.dense import PixelTokens, maps_for, pixel_tokens
from eval.probe import run_probe
from eval.protocol import Protocol
from eval.report import probe_table


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
    seen: Any = SimpleNamespace(native=False, image_size=48)
    found = {also: Protocol.of((), (0,), {}, only=(also,)) for also in ("segmentation", "depth", "knn")}
    assert {also: list(maps_for(protocol, dataset, torch.arange(5), seen)) for also, protocol in found.items()} == {
        "segmentation": ["masks"],
        "depth": ["depths"],
        "knn": [],
    }
    masks = maps_for(found["segmentation"], dataset, torch.tensor([3, 1]), seen)["masks"]
    assert torch.equal(masks[torch.tensor([1])][0], torch.from_numpy(picture(1, 48, 48)[..., 0] // 100).long())


def scenes(folder: Path, split: str, seed: int, with_maps: bool = True) -> None:
    """16-px images of four blocks, one of them bright, which the mask names and the depths tell."""
    folder.mkdir(exist_ok=True)
    files, rng = [], np.random.default_rng(seed)
    for number in range(24):
        cells = rng.permutation([0, 0, 0, 1]).reshape(2, 2).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        pixels = np.clip(60 + 120 * cells[..., None] + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        files.append((f"{split}{number}.png", encode(pixels)))
        if with_maps and number:  # the first has none
            files += [(f"{split}{number}.mask.png", encode(cells)), (f"{split}{number}.depth.png", encode(cells + 1))]
    write_tar(folder / f"{split}-000000.tar", files)


def test_from_shards_to_a_table(tmp_path: Path, encoder_folder: Path) -> None:
    """Without any label: encoder, untrained encoder and raw pixels, each of its own patches."""
    for seed, split in enumerate(("train", "val")):
        scenes(tmp_path / "shards", split, seed)
    result = run_probe(
        str(encoder_folder), str(tmp_path / "shards"), only=("segmentation", "depth"), progress=False,
        untrained_seeds=(0,), seeds=(0,), out=tmp_path / "probe.json",
    )  # fmt: skip
    rows = [result["rows"]["pretrained"], *result["rows"]["untrained"], result["rows"]["pixels"]]
    for row in rows:
        assert (row["segmentation"]["num_train"], row["segmentation"]["without_mask"]) == (23, 2)
        assert row["segmentation"]["grid"] == [4, 4]
        assert row["depth"]["r2"]["standard_error"] > 0
    assert rows[-1]["segmentation"]["linear"]["iou"]["value"] > 0.8  # brightness is in the pixels
    assert rows[-1]["depth"]["r2"]["value"] > 0.8
    assert {column["name"] for column in result["columns"] if column["headline"]} == {
        "segmentation_linear_iou",
        "segmentation_knn_iou",
        "depth_r2",
    }
    assert any("2 images have no mask" in note for note in result["notes"])
    table = Console(width=200, file=io.StringIO())
    table.print(probe_table(result))
    assert "linear seg. mIoU" in " ".join(table.file.getvalue().split())


def test_shards_without_masks_are_refused_with_what_to_do(tmp_path: Path, encoder_folder: Path) -> None:
    for seed, split in enumerate(("train", "val")):
        scenes(tmp_path / "shards", split, seed, with_maps=False)
    with pytest.raises(ValueError, match=r"no image of train has masks.*--masks"):
        run_probe(str(encoder_folder), str(tmp_path / "shards"), only=("segmentation",), progress=False)
