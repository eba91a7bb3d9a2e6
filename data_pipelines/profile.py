"""Where the time of a sample goes on its way into a batch, and how many cores keep a given GPU busy."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.datasets.bad_samples import Decoded, Decoder
from data_pipelines.images.jpeg import read_header
from data_pipelines.images.regions import Choose, Region
from data_pipelines.images.stacks import ChooseFrames
from data_pipelines.loader import Loader
from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.params import CropParams

#: The stages of a sample, in their order; `waiting` is for the interpreter's lock, the disk or the end of a step.
STAGES = ("read", "header and draw", "decode", "crops", "colour", "masks", "waiting")
_ROUNDS = 3
_ROWS = 64  # of a step while profiling


@dataclass(frozen=True)
class Profile:
    """Rates are rows of a batch a second."""

    backend: str
    threads: int
    rate_of_one: float
    rate_of_all: float
    milliseconds: dict[str, float]  # of a thread for each row, by stage

    @property
    def scaling(self) -> float:
        """Of all threads against one, as a share of their number."""
        return self.rate_of_all / self.rate_of_one / self.threads

    def cores_for(self, rate: float) -> int:
        """Cores that make so many rows a second, each as fast as these."""
        return math.ceil(rate * self.threads / self.rate_of_all)


class Watch:
    """Times the parts of a loader; what they do is theirs. Adds a second run of the backend for each sample.

    Args:
        loader: To be watched from now on.
    """

    def __init__(self, loader: Loader) -> None:
        self._spent: dict[str, list[float]] = defaultdict(list)  # appending is safe in threads, adding is not
        self._headers: list[bytes] = []
        for key, decoder in loader.decoders.items():
            decoder.dataset = _WatchedDataset(decoder.dataset, self)  # type: ignore[assignment]
            loader.decoders[key] = _WatchedDecoder(decoder, self)  # type: ignore[assignment]
        maker = loader.maker
        if maker.draw is not None:
            maker.draw = self._timed("masks", maker.draw)
        self._backend, maker.recipe.backend = maker.recipe.backend, self._execute

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of what happens inside to a stage."""
        began = time.perf_counter()
        yield
        self._spent[stage].append(time.perf_counter() - began)

    def clear(self) -> None:
        """Forget what was seen so far."""
        self._spent.clear()

    def seconds(self) -> dict[str, float]:
        """What each stage but waiting took in all, and `watching`, which is the profiler's own."""
        spent = defaultdict(float, {stage: sum(times) for stage, times in list(self._spent.items())})
        began = time.perf_counter()
        for content in self._headers:
            read_header(content)
        header = (time.perf_counter() - began) / max(len(self._headers), 1) * len(self._spent["read"])
        return {
            "read": spent["read"],
            "header and draw": spent["draw"] + header,
            "decode": max(0.0, spent["sample"] - spent["read"] - spent["draw"] - header),
            "crops": spent["geometry"],
            "colour": max(0.0, spent["crops"] - spent["geometry"]),
            "masks": spent["masks"],
            "watching": spent["geometry"],
        }

    def keep(self, content: bytes) -> None:
        """A sample's bytes, some of which show how long a header takes."""
        if len(self._headers) < 200:
            self._headers.append(content)

    def _timed(self, stage: str, function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            with self.time(stage):
                return function(*arguments)

        return call

    def _execute(self, image: np.ndarray, jobs: Sequence[CropJob]) -> None:
        plain = [job._replace(params=CropParams(job.params.box, job.params.flip)) for job in jobs]
        with self.time("geometry"):
            self._backend(image, plain)
        with self.time("crops"):
            self._backend(image, jobs)


class _WatchedDataset:
    def __init__(self, dataset: Any, watch: Watch) -> None:
        self._dataset, self._watch = dataset, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def read(self, sample: int) -> Any:
        with self._watch.time("read"):
            stored = self._dataset.read(sample)
        self._watch.keep(stored.image)
        return stored


class _WatchedDecoder:
    def __init__(self, decoder: Decoder, watch: Watch) -> None:
        self._decoder, self._watch = decoder, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def read(self, sample: int, choose: Choose, frames: ChooseFrames | None = None) -> Decoded:
        def timed(size: tuple[int, int]) -> Region:
            with self._watch.time("draw"):
                return choose(size)

        with self._watch.time("sample"):
            return self._decoder.read(sample, timed, frames)


def profile(make: Callable[[int | None], Loader], seconds: float = 12.0) -> Profile:
    """Run loaders for about so many seconds in all, and say how fast they are and what they do.

    Args:
        make: A new loader of so many threads, None for as many as it would take itself.
        seconds: Longer is steadier: others use the machine, too.
    """
    share = seconds / (2 * _ROUNDS + 1)
    rates: dict[int | None, list[float]] = {1: [], None: []}
    threads = 1
    for _ in range(_ROUNDS):  # in turns, as machines are noisy
        for number, found in rates.items():
            with make(number) as loader:
                found.append(_rate(loader, share))
                threads = max(threads, loader.threads)
    with make(None) as loader:
        watch, steps = Watch(loader), loader.steps()
        next(steps)
        watch.clear()
        began, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - began < share:
            next(steps)
            count += loader.num_rows
        wall = time.perf_counter() - began
        spent = watch.seconds()
        steps.close()
    spent["waiting"] = max(0.0, threads * wall - sum(spent.values()))
    one, all_of_them = (statistics.median(rates[number]) for number in (1, None))
    milliseconds = {stage: 1000 * spent[stage] / count for stage in STAGES}
    return Profile(loader.backend, threads, one, all_of_them, milliseconds)


def _rate(loader: Loader, seconds: float) -> float:
    steps = loader.steps()
    for _ in range(loader.prefetch + 1):  # made while nobody waited
        next(steps)
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        next(steps)
        count += loader.num_rows
    elapsed = time.perf_counter() - began
    steps.close()
    return count / elapsed


def ranks_for_profiling(batch_size: int) -> int:
    """Among how many ranks a batch is divided while profiling: a step stays small, and its path the real one."""
    numbers = (ranks for ranks in range(1, batch_size + 1) if batch_size % ranks == 0)
    return max(ranks for ranks in numbers if ranks == 1 or batch_size // ranks >= _ROWS)
