"""How far a pass over images is: a bar on a terminal, a line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

TELL_SECONDS = 30.0


class Advance(Protocol):
    def __call__(self, images: int) -> None:
        """So many more are done."""
        ...


@contextmanager
def counting(what: str, total: int, shown: bool, lines: bool = False) -> Iterator[Advance]:
    """Images per second and the time left, on standard error: a bar where it is `shown`.

    lines: where standard error is no terminal, a line every half a minute stands for the bar.
    """
    if lines and not sys.stderr.isatty():
        yield _lines(what, total) if shown else lambda images: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(what, total=total, rate="")
        start, seen = time.monotonic(), 0

        def advance(images: int) -> None:
            nonlocal seen
            seen += images
            bar.update(task, completed=seen, rate=f"{seen / max(time.monotonic() - start, 1e-9):,.0f} images/s")

        yield advance


def _lines(what: str, total: int) -> Advance:
    start = told = time.monotonic()
    seen = 0

    def advance(images: int) -> None:
        nonlocal seen, told
        seen += images
        now = time.monotonic()
        if now - told >= TELL_SECONDS:
            told = now
            rate = seen / (now - start)
            left = f"{(total - seen) / rate / 60:,.0f} min left"
            print(f"{what}: {seen:,} of {total:,}, {rate:,.0f} images/s, {left}", file=sys.stderr, flush=True)

    return advance
