"""How far a pack is, and how fast it goes."""

from __future__ import annotations

import time
from threading import Lock
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """Counts images and bytes from any thread, behind a bar if `shown`, which says what one is `doing`.

    The rate in the bar is that of all the time so far.
    """

    def __init__(self, total: int, shown: bool, doing: str = "packing") -> None:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), disable=not shown)
        self._task = self._bar.add_task(doing, total=total, rate="")
        self._lock = Lock()
        self._start = self._end = time.monotonic()
        self.num_images = self.num_bytes = 0

    def advance(self, num_bytes: int) -> None:
        """One more image, of so many bytes."""
        with self._lock:
            self.num_images += 1
            self.num_bytes += num_bytes
            self._end = time.monotonic()
        self._bar.update(self._task, advance=1, rate=self._rate())

    def told(self) -> str:
        """How much in what time."""
        return f"{self.num_images:,} images in {self._end - self._start:.1f} s: {self._rate()}"

    def _rate(self) -> str:
        seconds = max(self._end - self._start, 1e-3)
        return f"{self.num_images / seconds:,.0f} images/s, {self.num_bytes / seconds / 1e6:,.1f} MB/s"

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
