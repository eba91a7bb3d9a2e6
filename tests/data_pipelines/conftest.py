"""Shards made on the fly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from making import sample_files, write_tar

from data_pipelines.datasets.dataset import Dataset, open_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three ragged shards, 50 samples in all."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate((range(20), range(20, 23), range(23, 50))):
        write_tar(folder / f"train-{shard:06d}.tar", sample_files(numbers))
    return folder


@pytest.fixture
def dataset(shards: Path) -> Iterator[Dataset]:
    with open_dataset(shards) as opened:
        yield opened
