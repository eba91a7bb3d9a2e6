"""Data whose bytes change while names and lengths stay: what was made of the earlier ones is not taken for theirs."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.datasets.dataset import open_dataset
from eval.embed import embed
from eval.probe import run_probe
from eval.splits import open_splits
from eval.store.reading import open_store


def write(folder: Path, seed: int, ages: str = "") -> None:
    """40 arrays of train and 24 of val with labels, of pixels of `seed`; `ages`: a digit for each sample."""
    for split, count in (("train", 40), ("val", 24)):
        rng = np.random.default_rng((seed, count))
        with tarfile.open(folder / f"{split}-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(count):
                image = io.BytesIO()
                np.save(image, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                known = json.dumps({"kind": int(ages[number % len(ages)])}) if ages else "{}"
                members = {"npy": image.getvalue(), "cls": str(number % 2).encode(), "json": known.encode()}
                for suffix, content in members.items():
                    entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def spoil(shard: Path, numbers: tuple[int, ...]) -> None:
    """Make the images of these numbers unreadable."""
    with tarfile.open(shard) as tar:
        images = [member for member in tar.getmembers() if member.name.endswith((".png", ".jpg"))]
    with shard.open("r+b") as file:
        for number in numbers:
            file.seek(images[number].offset_data)
            file.write(b"?" * images[number].size)


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    (tmp_path / "arrays").mkdir()
    write(tmp_path / "arrays", 0)
    return tmp_path / "arrays"


def scores(target: Path, data: Path, **options) -> dict:
    found = run_probe(str(target), str(data), only=("knn",), untrained_seeds=(0,), progress=False, **options)["rows"]
    return {name: json.dumps(found[name], sort_keys=True) for name in ("pretrained", "untrained", "pixels")}


def test_a_probe_computes_anew(target: Path, arrays: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, checksum = scores(target, arrays), open_dataset(arrays).checksum
    write(arrays, 1)
    assert open_dataset(arrays).checksum == checksum
    after = scores(target, arrays)
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "empty"))
    assert after == scores(target, arrays)
    assert all(after[name] != before[name] for name in after)


def test_baselines_are_of_the_labels_of_a_field(arrays: Path) -> None:
    write(arrays, 0, ages="01")
    digests = {open_splits(str(arrays), label="kind", kind="class").digest for _ in range(2)}
    write(arrays, 0, ages="0110100110010110")
    digests.add(open_splits(str(arrays), label="kind", kind="class").digest)
    assert len(digests) == 2


def test_a_store_of_other_images_is_neither_read_nor_gone_on_with(target: Path, arrays: Path, tmp_path: Path) -> None:
    quiet: dict = {"progress": False, "say": lambda line: None}
    embed(str(target), str(arrays), tmp_path / "store", **quiet)
    scores(target, arrays, store=tmp_path / "store")
    write(arrays, 1)
    with pytest.raises(ValueError, match="was another image; make it again"):
        scores(target, arrays, store=tmp_path / "store")
    with pytest.raises(ValueError, match="was another image; make it again"):
        embed(str(target), str(arrays), tmp_path / "store", **quiet)


def test_rows_of_unreadable_images_are_not_their_neighbours(
    target: Path, tmp_path: Path, write_shard: Callable
) -> None:
    write_shard(tmp_path / "data" / "train-000000.tar", [0, 1] * 4)
    spoil(tmp_path / "data" / "train-000000.tar", (1, 6))
    embed(str(target), str(tmp_path / "data"), tmp_path / "store", progress=False, say=lambda line: None, tokens=True)
    stored = open_store(tmp_path / "store")["train"]
    assert stored.samples.tolist() == [0, 2, 3, 4, 5, 7]
    for asked in (range(8), range(7), [0, 1, 2], [1, 6]):
        found = stored.feature_set(np.array(asked))
        expected = [number for number in asked if number not in (1, 6)]
        assert found.ids.tolist() == expected
        rows = torch.tensor([stored.samples.tolist().index(number) for number in expected], dtype=torch.int64)
        assert torch.equal(found.inputs["class"], stored.feature_set().inputs["class"][rows])
        assert torch.equal(found.tokens[torch.arange(len(rows))], stored.feature_set().tokens[rows])
