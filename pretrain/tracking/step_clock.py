"""Where the time of a step goes: data, forward, backward, optimizer, average, waiting for the other ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Part = Literal["data", "forward", "backward", "optimizer", "average", "waiting"]
PARTS: tuple[Part, ...] = get_args(Part)
#: Unread marks of the device after which those that it has passed are read between two log lines.
MANY_MARKS = 512


class StepClock:
    """Sums up the seconds of each part of this rank's steps; see `read`.

    On a GPU by events in the stream that computes: what is measured is when the device gets there, so a part's time is
    what the device computed, or stood still, for it, and the host never waits to learn it. On the CPU by its clock.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: deque[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self.tracing = False  # whether a profiler records, which then shows the parts by name

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """What happens inside belongs to this part. Parts do not nest."""
        if self.tracing:
            with torch.profiler.record_function(f"step: {name}"), self._measured(name):
                yield
        else:
            with self._measured(name):
                yield

    @contextmanager
    def _measured(self, name: Part) -> Iterator[None]:
        if not self._on_gpu:
            before = self._clock()
            try:
                yield
            finally:
                self._seconds[name] += self._clock() - before
            return
        began = self._mark()
        try:
            yield
        finally:
            self._marks.append((name, began, self._mark()))
            if len(self._marks) >= MANY_MARKS:
                self._read_marks()

    def read(self, seconds: float) -> dict[str, float]:
        """The share of each part in the last `seconds`, which are those since the last call, as `forward_share` and so
        on. On a GPU, what the device has not come to yet counts next time."""
        self._read_marks()
        shares = {f"{name}_share": min(1.0, spent / max(seconds, 1e-9)) for name, spent in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return shares

    def _mark(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_marks(self) -> None:
        while self._marks and self._marks[0][2].query():
            name, began, ended = self._marks.popleft()
            self._seconds[name] += began.elapsed_time(ended) / 1000
            self._spare += [began, ended]
