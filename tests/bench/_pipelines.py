"""What the benchmarks of whole paths share: their shards, and our loader as a function to time."""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _photos import write_shards
from PIL import Image

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.loader import Loader
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Views


@contextmanager
def bench_shards(count: int = 128) -> Iterator[Dataset]:
    """The data set that `--data` names, else built-in photos."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="shards to take instead of built-in photos")
    data = parser.parse_args().data
    with (
        tempfile.TemporaryDirectory() as folder,
        open_dataset(data or write_shards(Path(folder), count)) as dataset,
    ):
        yield dataset


def one_by_one(contents: Sequence[bytes], recipe: Callable[[Image.Image], Any]) -> Callable[[], None]:
    """A call decodes these images by Pillow and gives each to an authors' recipe."""

    def call() -> None:
        for content in contents:
            recipe(Image.open(io.BytesIO(content)).convert("RGB"))

    return call


def loader_rows(
    dataset: Dataset, views: Views, *, rows: int, threads: int = 1, batch_size: int = 64, **options: Any
) -> Callable[[], None]:
    """A call makes `rows` rows of batches with a new loader, in which nothing has been prepared."""
    repeats = options.pop("repeats", 1)
    sampler = Sampler((dataset,), seed=0, batch_size=batch_size, repeats=repeats)
    prefetch = min(1, threads - 1)  # one thread begins nothing that is not asked for; several must not idle

    def call() -> None:
        with Loader(sampler, views, threads=threads, prefetch=prefetch, **options) as loader:
            steps = loader.steps()
            for _ in range(rows // batch_size):
                next(steps)
            steps.close()

    return call
