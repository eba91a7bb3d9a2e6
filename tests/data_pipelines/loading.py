"""Loaders of small batches, and what tests ask of these and of processes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from drawing import draw

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.loader import Batch, Loader
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, Views

VIEWS = Views(global_crops=(Crop(size=16, jitter=(0.4, 0.4, 0.2, 0.1), blur=0.5),))
SECONDS = 30.0  # for what takes milliseconds on a machine without other work


def loader_of(dataset: Dataset, workers: int = 2, batch_size: int = 10, repeats: int = 1, **options: Any) -> Loader:
    options = {"draw": draw, "threads": 1, **options}
    sampler = Sampler((dataset,), seed=0, batch_size=batch_size, repeats=repeats)
    return Loader(sampler, VIEWS, workers=workers, **options)


def copied(steps: Iterator[list[Batch]], count: int) -> list[Batch]:
    return [{name: part.clone() for name, part in batch.items()} for (batch,) in itertools.islice(steps, count)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, part in one.items():
            assert torch.equal(part, other[name]), name


def is_running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)
