"""Data sets: found by a spec, numbered through, read at random."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset
from making import encode, picture, sample_files, write_tar

from data_pipelines.datasets import dataset as dataset_module
from data_pipelines.datasets.dataset import Dataset, find_shards, open_dataset


def test_every_sample_is_what_webdataset_reads(shards: Path, dataset: Dataset) -> None:
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    expected = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert dataset.num_samples == len(expected) == 50
    assert dataset.shard_sizes == (20, 3, 27)
    for number, sample in enumerate(expected):
        ours = dataset.read(number)
        assert (ours.key, ours.image, ours.label) == (sample["__key__"], sample["png"], int(sample["cls"]))
    with pytest.raises(IndexError, match="sample 50 of a data set of 50"):
        dataset.read(50)


def test_several_data_sets_share_the_files_that_a_process_may_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        write_tar(tmp_path / f"train-{number:06d}.tar", sample_files([number]))
    datasets = [open_dataset(tmp_path) for _ in range(4)]
    monkeypatch.setattr(dataset_module, "_datasets", datasets)
    monkeypatch.setattr(dataset_module.resource, "getrlimit", lambda which: (80, 80))
    for dataset in datasets:
        for sample in range(12):
            dataset.read(sample)
    assert [len(dataset._open) for dataset in datasets] == [10] * 4  # together half of the 80
    monkeypatch.setattr(dataset_module, "_datasets", datasets[:1])
    for dataset in datasets:
        for sample in range(12):
            dataset.read(sample)
    assert [len(dataset._open) for dataset in datasets] == [12] * 4


def test_specs(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"train-{number:06d}.tar" for number in range(3)]
    monkeypatch.chdir(shards.parent)
    for spec in (
        shards,
        str(shards),
        f"{shards}/train-*.tar",
        f"{shards}/train-{{000000..000002}}.tar",
        f"{shards.name}/*.tar",
    ):
        assert [path.name for path in find_shards(spec)] == names
    assert [path.name for path in find_shards(f"{shards}/train-{{000002,000000}}.tar")] == [names[2], names[0]]
    assert [path.name for path in find_shards(shards / names[1])] == [names[1]]


def test_a_spec_that_finds_nothing_says_what_there_is(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no val-\*.tar; its shards begin with train"):
        open_dataset(shards, "val")
    with pytest.raises(FileNotFoundError, match="selfsight pack"):
        open_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"000009\.tar does not exist"):
        open_dataset(f"{shards}/train-{{000000,000009}}.tar")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_dataset(f"{shards}/nothing-*.tar")
    with pytest.raises(ValueError, match="more than once"):
        open_dataset(f"{shards}/train-{{000001,000001}}.tar")
    write_tar(tmp_path / "train-000000.tar", [("a.txt", b"")])
    with pytest.raises(ValueError, match="no sample"):
        open_dataset(tmp_path)


def test_the_checksum_is_that_of_the_content(shards: Path, dataset: Dataset, tmp_path: Path) -> None:
    moved = shutil.copytree(shards, tmp_path / "moved")  # other path, other time
    assert open_dataset(moved).checksum == dataset.checksum
    write_tar(moved / "train-000001.tar", sample_files([20, 22, 21]))
    assert open_dataset(moved).checksum != dataset.checksum


def test_dataset_json_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", sample_files(range(2)))
    plain = open_dataset(tmp_path)
    assert plain.mean is plain.std is plain.classes is None
    info = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "classes": ["cat", "dog"]}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    described = open_dataset(tmp_path)
    assert (described.mean, described.classes) == ((0.1, 0.2, 0.3), ("cat", "dog"))


def test_a_shard_without_samples_is_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", sample_files([0]))
    write_tar(tmp_path / "train-000001.tar", [])
    write_tar(tmp_path / "train-000002.tar", sample_files([1, 2]))
    dataset = open_dataset(tmp_path)
    assert dataset.shard_sizes == (1, 0, 2)
    assert [dataset.read(number).key for number in range(3)] == ["000000", "000001", "000002"]


def test_shards_without_a_sample_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(9):
        write_tar(tmp_path / f"train-{number:06d}.tar", sample_files([number]) if number in (0, 3) else [])
    open_dataset(tmp_path)
    named = next(record.message for record in caplog.records if record.message.startswith("without a sample: "))
    assert str(tmp_path / "train-000001.tar") in named
    assert "train-000000" not in named
    assert "train-000003" not in named
    assert named.endswith(" and 2 more")


@pytest.mark.parametrize(
    ("statistics", "depth"),
    [
        ({"bits": 16, "max": [0.0625, 0.5]}, (16, 32768)),
        ({"bits": 8, "max": [1.0]}, (8, 255)),
        ({"none": "no two are alike"}, None),
        ({"bits": 16, "max": []}, None),
        ([], None),
    ],
)
def test_the_depth_is_what_the_description_measured(
    tmp_path: Path, statistics: object, depth: tuple[int, int] | None
) -> None:
    write_tar(tmp_path / "train-000000.tar", sample_files([0]))
    (tmp_path / "dataset.json").write_text(json.dumps({"statistics": statistics}))
    assert open_dataset(tmp_path).depth == depth


READ_ONE = """
import sys
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.loader import Loader
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, Views

views = Views(global_crops=(Crop(size=16),))
with Loader(Sampler((open_dataset(sys.argv[1]),), seed=0, batch_size=1), views, threads=1) as loader:
    assert next(loader.steps()) is not None
    print(*(name for name in sys.modules if name.startswith("data_pipelines.")))
"""


def test_a_local_jpeg_needs_few_modules(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [("0.jpg", encode(picture(0), "JPEG"))])
    run = subprocess.run([sys.executable, "-c", READ_ONE, str(tmp_path)], capture_output=True, text=True, check=True)
    names = {name.removeprefix("data_pipelines.") for name in run.stdout.split()}
    unused = (
        "packing",
        "checks",
        "remote.cache",
        "remote.http",
        "remote.fsspec",
        "children",
        "images.tiff",
        "images.npy",
    )
    assert not [name for name in names if name.startswith((*unused, "datasets.remote_index", "images.dicom"))]
    assert len(names) <= 72  # rooms and compiled ones too


def num_open_files(folder: Path) -> int:
    """Of this folder's files: others may be closed meanwhile by whoever else the process holds."""
    places = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    return sum(Path(place).is_relative_to(folder) for place in places)


def test_threads_share_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        write_tar(tmp_path / f"train-{number:06d}.tar", [(f"{number}.png", encode(picture(number)))])
    monkeypatch.setattr(dataset_module, "_MAX_OPEN_SHARDS", 2)
    with open_dataset(tmp_path) as dataset, ThreadPoolExecutor(4) as pool:
        for number, sample in enumerate(pool.map(dataset.read, list(range(8)) * 20)):
            assert sample.key == str(number % 8)
        assert num_open_files(tmp_path) <= 2
    assert num_open_files(tmp_path) == 0
