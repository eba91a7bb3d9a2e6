"""Shards brought here before they are read, in the order in which they will be."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.remote.fetch import CancelledError, cancel_on

PREFETCH_STEPS = 1000  # steps
_CONNECTIONS = 4  # shards fetched at a time
_KEEP_SECONDS = 5.0
_JOIN_SECONDS = 2.0
_log = logging.getLogger(__name__)


class Need(NamedTuple):
    """A shard that is read: the number `shard` of `dataset`."""

    dataset: Dataset
    shard: int


class ShardPrefetcher:
    """Fetches what the next steps read, where it must be fetched; without such data sets it does nothing.

    What is fetched and not yet read is at most this process's share of the cache, so that it is not removed again
    before its time. A shard that cannot be fetched is logged; the reader that needs it tries again, and fails if that
    fails.

    Args:
        datasets: What is read.
        needs: The shards of each step in turn. Taken by a thread of its own.
        horizon: Steps looked ahead; 0: nothing is fetched ahead.
        first: The number of the first step, for messages.
    """

    def __init__(
        self,
        datasets: Iterable[Dataset],
        needs: Iterable[Iterable[Need]],
        horizon: int = PREFETCH_STEPS,
        first: int = 0,
    ) -> None:
        self._needs, self._horizon, self._first = iter(needs), horizon, first
        self._position = 0  # of the consumer, in steps from the first
        self._last_step: dict[Need, int] = {}  # that reads a shard, of those that are here or on their way
        self._num_bytes = 0  # of those
        self._warned = False
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._jobs: queue.SimpleQueue[tuple[int, Need] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        if not horizon or not any(dataset.fetches for dataset in datasets):
            return
        self._threads = [threading.Thread(target=self._plan, name="fetch-plan", daemon=True)]
        self._threads += [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True) for number in range(_CONNECTIONS)
        ]
        for thread in self._threads:  # daemons: a process that ends does not wait for a shard
            thread.start()

    def advance(self) -> None:
        """The consumer has done one step more."""
        with self._changed:
            self._position += 1
            for need in [need for need, last in self._last_step.items() if last < self._position]:
                del self._last_step[need]
                self._num_bytes -= _size(need)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop; what is half fetched is kept."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)  # one that a stalled server keeps waiting ends by itself, later

    def __enter__(self) -> ShardPrefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _plan(self) -> None:
        try:
            self._plan_all()
        except Exception as error:  # the reader meets it too, and is the one to end
            _log.warning("nothing is fetched ahead any more: %s", error)

    def _plan_all(self) -> None:
        kept = time.monotonic()
        for step, needs in enumerate(self._needs):
            shards = [need for need in dict.fromkeys(needs) if need.dataset.fetches]
            self._warn(shards)
            for need in shards:
                with self._changed:
                    while not self._stop.is_set() and not self._has_room(step, need):
                        self._changed.wait(_KEEP_SECONDS)
                        if time.monotonic() - kept > _KEEP_SECONDS:
                            kept = time.monotonic()
                            self._keep()
                    if self._stop.is_set():
                        return
                    is_new = need not in self._last_step
                    self._last_step[need] = step
                    self._num_bytes += _size(need) if is_new else 0
                if is_new:
                    self._jobs.put((step, need))
            if self._stop.is_set():
                return

    def _has_room(self, step: int, need: Need) -> bool:
        if step <= self._position:  # needed now: it is fetched in any case
            return True
        if step >= self._position + self._horizon:
            return False
        return need in self._last_step or self._num_bytes + _size(need) <= _share(need.dataset)

    def _keep(self) -> None:
        """Have the cache keep what will be read, which nobody has opened yet."""
        for need in self._last_step:
            file = need.dataset.fetched(need.shard)
            if file is not None:
                need.dataset.cache.touch(file)

    def _work(self) -> None:
        cancel_on(self._stop)
        while (job := self._jobs.get()) is not None:
            step, need = job
            file = need.dataset.fetched(need.shard)
            with self._changed:
                over = self._stop.is_set() or self._last_step.get(need) is None
            if file is None or over:
                continue
            try:
                need.dataset.cache.fetch(file)
            except CancelledError:
                return
            except (OSError, ValueError) as error:
                _log.warning("for step %d, ahead of its time: %s", self._first + step, error)

    def _warn(self, shards: list[Need]) -> None:
        if self._warned or not shards:
            return
        needed, share = sum(map(_size, shards)), _share(shards[0].dataset)
        if needed > share:
            from data_pipelines.remote.cache_folder import gigabytes

            self._warned = True
            _log.warning(
                "one step reads %d shards of %s together, and this process's share of the cache is %s: shards will be "
                "fetched again and again. Raise data.cache.max_bytes, or set data.lanes lower, which reads fewer "
                "shards at a time",
                len(shards),
                gigabytes(needed),
                gigabytes(share),
            )


@contextmanager
def naming(step: int) -> Iterator[None]:
    """Add the step to an error in whose message our own code says what could not be had."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            error.args = (f"step {step} cannot be made: {error}",)
        raise


def in_order(dataset: Dataset, first: int, last: int, batch_size: int) -> Iterator[list[Need]]:
    """The needs of who reads samples `first` .. `last` - 1 one after the other, `batch_size` at a time."""
    for start in range(first, last, batch_size):
        shards = dataset.shards_of([start, min(start + batch_size, last) - 1])
        yield [Need(dataset, shard) for shard in range(int(shards[0]), int(shards[-1]) + 1)]


def in_batches(dataset: Dataset, samples: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[list[Need]]:
    """The needs of who reads these samples, wherever they lie, `batch_size` at a time."""
    for start in range(0, len(samples), batch_size):
        shards = dataset.shards_of(samples[start : start + batch_size]).tolist()
        yield [Need(dataset, shard) for shard in dict.fromkeys(shards)]


def _size(need: Need) -> int:
    return int(need.dataset.index.sizes[need.shard])


def _share(dataset: Dataset) -> int:
    """Bytes of the cache for this process, beside the other ranks of its job on this machine."""
    return dataset.cache.max_bytes // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
