"""One iteration over steps: buffers, and threads or processes that fill them."""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import torch

from data_pipelines.buffers import StepBuffer
from data_pipelines.datasets.prefetch import ShardPrefetcher
from data_pipelines.files import in_memory
from data_pipelines.layout import Field, Layout
from data_pipelines.rows import RowMaker

if TYPE_CHECKING:
    from data_pipelines.children.parent import Children

_log = logging.getLogger(__name__)


class Run(Protocol):
    """Who fills the buffers."""

    buffers: list[StepBuffer]

    def begin(self, number: int, step: int) -> None:
        """Have buffer `number`, which nobody uses any more, filled with a step."""

    def is_made(self, step: int) -> bool:
        """Whether a step that was begun is there, or an error in its place."""

    def wait(self, step: int) -> None:
        """Return when it is; raises that error."""

    def advance(self) -> None:
        """The consumer has done a step."""

    def close(self) -> None:
        """Give up what was begun."""


class ThreadRun:
    """Threads of this process.

    Args:
        maker: Whose threads.
        rows: Positions in the global batch.
        count: Of the buffers.
        pin_memory: Whether a GPU is to copy from the buffers asynchronously.
        start: The first step.
        horizon: Steps of which the shards are fetched before they are read.
    """

    def __init__(self, maker: RowMaker, rows: range, count: int, *, pin_memory: bool, start: int, horizon: int) -> None:
        fields = maker.fields()
        self.buffers = [StepBuffer.allocate(fields, rows, pin_memory) for _ in range(count)]
        self._maker, self._rows = maker, rows
        self._pending: dict[int, list[Future[None]]] = {}
        self._stop = threading.Event()  # ends what the threads are fetching
        self._prefetcher = ShardPrefetcher(maker.sampler.datasets.values(), maker.needs(start, rows), horizon, start)

    def begin(self, number: int, step: int) -> None:
        buffer = self.buffers[number]
        self._pending[step] = self._maker.begin(
            buffer.arrays, step, self._rows, stop=self._stop, wait=buffer.wait_until_free
        )

    def is_made(self, step: int) -> bool:
        return all(future.done() for future in self._pending[step])

    def wait(self, step: int) -> None:
        for future in self._pending[step]:
            future.result()
        del self._pending[step]

    def advance(self) -> None:
        self._prefetcher.advance()

    def close(self) -> None:
        self._stop.set()
        self._prefetcher.close()
        remaining = [future for futures in self._pending.values() for future in futures if not future.cancel()]
        wait(remaining)  # they write into buffers that go now


class ChildRun:
    """Children, into memory that all share: an anonymous file, of which nothing is left when the processes end.

    Args:
        children: They.
        fields: Of a row.
        rows: Positions in the global batch.
        count: Of the buffers.
        pin_memory: Whether a GPU is to copy from the buffers asynchronously.
        start: The first step.
    """

    def __init__(
        self,
        children: Children,
        fields: Mapping[str, Field],
        rows: range,
        count: int,
        *,
        pin_memory: bool,
        start: int,
    ) -> None:
        layout = Layout(fields, len(rows))
        descriptor = in_memory("batches")
        try:
            _take_room(descriptor, count * layout.num_bytes)
            memory = mmap.mmap(descriptor, 0)
            self._memory = children.open(descriptor, start)
        finally:
            os.close(descriptor)
        self._pinned = _Pinned(memory) if pin_memory and torch.cuda.is_available() else None
        self.buffers = [StepBuffer(layout.arrays(memory, number), rows, pin_memory) for number in range(count)]
        self._children = children
        self._waiting: deque[tuple[int, int]] = deque()  # buffers from which the GPU still copies, and their steps

    def begin(self, number: int, step: int) -> None:
        self._waiting.append((number, step))
        self._hand_out()

    def is_made(self, step: int) -> bool:
        self._hand_out()
        return all(waiting != step for _, waiting in self._waiting) and self._children.is_made(self._memory, step)

    def wait(self, step: int) -> None:
        self._hand_out()
        while any(waiting == step for _, waiting in self._waiting):
            self.buffers[self._waiting[0][0]].wait_until_free()
            self._hand_out()
        self._children.wait(self._memory, step)

    def advance(self) -> None:
        self._children.advance(self._memory)

    def close(self) -> None:
        self._children.forget(self._memory)
        if self._pinned is not None:
            torch.cuda.synchronize()  # the last batch may be on its way yet, and nobody has said that it arrived
            self._pinned.release()

    def _hand_out(self) -> None:
        while self._waiting and self.buffers[self._waiting[0][0]].is_free:
            self._children.make(self._memory, *self._waiting.popleft())


def _take_room(descriptor: int, num_bytes: int) -> None:
    """Make a file in memory so long, and all of it there: whoever wrote where none is left would end by SIGBUS."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        told = (
            f"there is no room for {num_bytes / 1e6:.1f} MB of batches that processes share ({error.strerror}); give "
            "the job more memory (a container without memfd also a larger /dev/shm: docker run --shm-size), lower "
            "data.prefetch, or set data.workers=0"
        )
        raise OSError(error.errno, told) from None


class _Pinned:
    """Memory that is page-locked for this process's GPU; where that fails, copies are slower and all else the same."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        error = torch.cuda.cudart().cudaHostRegister(self._address, len(memory), 0)
        self._held = int(error) == 0
        if not self._held:
            with suppress(RuntimeError):  # CUDA tells its last error to the next launch, whose it isn't
                torch.zeros(1, device="cuda")
            _log.warning(
                "%d MB of batches can't be page-locked (CUDA error %d), so copies to the GPU wait; see `ulimit -l`",
                len(memory) >> 20,
                int(error),
            )

    def release(self) -> None:
        if self._held:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._held = False
