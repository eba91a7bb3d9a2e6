"""A field of every sample's `.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from making import encode, picture, write_tar

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.fields import field_names, read_field


def test_a_field_is_read_of_every_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"site": "a"}, {"other": 1}, {"site": None}, {"site": [2, 3]}]
    members = [
        member
        for number, each in enumerate(said)
        for member in ((f"{number}.png", encode(picture(number))), (f"{number}.json", json.dumps(each).encode()))
    ]
    write_tar(tmp_path / "train-000000.tar", members)
    dataset = open_dataset(str(tmp_path), "train")
    assert field_names(dataset) == {"site", "other"}
    assert list(read_field(dataset, "site")) == ["a", None, None, [2, 3]]
    monkeypatch.setattr(Dataset, "read_metadata", None)
    assert list(read_field(dataset, "site")) == ["a", None, None, [2, 3]]
