"""The profiler runs the real loader, and what it tells adds up."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from making import encode, picture, write_tar

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.loader import Loader
from data_pipelines.profile import STAGES, Profile, Watch, profile, ranks_for_profiling
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, LocalCrops, Views

VIEWS = Views(
    global_crops=(Crop(size=32, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0),), local_crops=LocalCrops(size=16, count=2)
)


@pytest.fixture
def photos(tmp_path: Path) -> Dataset:
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.jpg", encode(picture(n, 120, 100), "JPEG")) for n in range(24)])
    return open_dataset(tmp_path)


def slow_mask(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
    time.sleep(0.01)  # most of what a sample takes, so that other work beside it hardly matters
    return {"token_mask": np.zeros((2, 2), dtype=bool)}


def test_what_is_watched_is_what_runs(photos: Dataset) -> None:
    batches = []
    for watched in (False, True):
        with Loader(Sampler((photos,), seed=0, batch_size=8), VIEWS, draw=slow_mask, threads=2) as loader:
            watch = Watch(loader) if watched else None
            batches.append(
                [
                    (batch["ids"].clone(), batch["global_crops"].clone(), batch["local_crops"].clone())
                    for (batch,) in itertools.islice(loader.steps(), 4)
                ]
            )
    for plain, seen in zip(*batches, strict=True):
        assert all(torch.equal(*pair) for pair in zip(plain, seen, strict=True))
    assert watch is not None
    spent = watch.seconds()
    assert all(spent[stage] > 0 for stage in ("read", "header and draw", "crops"))  # the others are differences
    assert spent["masks"] > 32 * 0.01


def test_it_adds_up(photos: Dataset) -> None:
    made: list[int | None] = []

    def make(threads: int | None) -> Loader:
        made.append(threads)
        sampler = Sampler((photos,), seed=0, batch_size=8)
        return Loader(sampler, VIEWS, draw=slow_mask, threads=threads or 3)

    found = profile(make, seconds=0.7)
    assert made == [1, None] * 3 + [None]
    assert found.threads == 3
    assert list(found.milliseconds) == list(STAGES)
    assert found.milliseconds["masks"] > 10
    # each thread's whole time is accounted for, less what the profiler itself took
    assert sum(found.milliseconds.values()) < 1.5 * 1000 * found.threads / found.rate_of_all + 5


def test_cores_for_a_rate() -> None:
    found = Profile("native", 4, 100.0, 300.0, {})
    assert found.scaling == 0.75
    assert found.cores_for(300) == 4
    assert found.cores_for(301) == 5


@pytest.mark.parametrize(("batch_size", "ranks"), [(8, 1), (64, 1), (127, 1), (128, 2), (4096, 64), (100, 1), (300, 4)])
def test_a_step_is_small_while_profiling(batch_size: int, ranks: int) -> None:
    assert ranks_for_profiling(batch_size) == ranks
