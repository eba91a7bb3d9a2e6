from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from making import sample_files, write_tar

from data_pipelines.checks.verify import verify
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.packing.pack_folder import agree


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1], r"it holds \[1\]"),
        ({"mean": 5}, "mean is 5, not a list of numbers"),
        ({"mean": "abc"}, "mean is 'abc', not a list"),
        ({"std": [0.1, "x"]}, "std is"),
        ({"mean": [float("nan")], "std": [1]}, "mean is"),
        ({"mean": [0.1], "std": [0.1, 0.2]}, "different lengths"),
        ({"mean": [0.1]}, "different lengths"),
        ({"classes": {"a": 1}}, "classes is"),
        ({"splits": [1]}, r"splits is \[1\]"),
        ({"splits": None}, "splits is None"),
        ({"splits": {"train": 3}}, "split 'train' lists no shards"),
        ({"splits": {"train": {"shards": [{"a": 1}]}}}, "without a name"),
        ({"splits": {"train": {"shards": [{"name": "x.tar", "samples": "x"}]}}}, "samples or bytes of shard 'x.tar'"),
    ],
)
def test_a_description_of_another_form_is_refused_wherever_it_is_read(content: Any, says: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", sample_files([0]))
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for read in (open_dataset, lambda folder: verify(folder, progress=False)):
        with pytest.raises(ValueError, match=rf"dataset\.json is no description.*: .*{says}"):
            read(tmp_path)
    (tmp_path / ".pack").mkdir()
    (tmp_path / ".pack/plan.json").write_text('{"seed": 0}')
    with pytest.raises((ValueError, FileExistsError), match=r"is no description|did not write"):
        agree(tmp_path, {"seed": 1}, overwrite=True)
    assert (tmp_path / "train-000000.tar").is_file()


def test_what_pack_writes_and_less_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", sample_files([0]))
    for content in ({}, {"mean": None, "classes": ["\udcff"], "more": [1]}, {"splits": {"train": {"shards": []}}}):
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        assert open_dataset(tmp_path).mean is None
