"""Rows of numbers by step in a file of one JSON object a line, which outlives full disks and servers that forget."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.files import write_text
from data_pipelines.wording import counted
from pretrain.tracking.console import say

MOST_HELD = 100_000  # rows in memory while nothing can be written
PAUSES = (0.05, 0.5)  # seconds between the tries of one row; a file system that is gone longer gets it with the next


class MetricsLog:
    """The writing end of `metrics.jsonl` and the like.

    A row that can't be written is kept in memory, said so once, and written with the next that can: training goes on.
    The file is opened for every row, so that other machines see it and a new handle replaces a stale one.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        """Continue the file at `path` after `start_step`; rows of later steps are dropped, for they will come again."""
        self.path = path
        self._held: deque[str] = deque()
        self._lost = 0
        self._torn = False  # whether the file may end in a part of a row
        _forget_after(path, start_step)

    @property
    def num_held(self) -> int:
        """How many rows are in memory only."""
        return len(self._held)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the row of a step."""
        if len(self._held) == MOST_HELD:
            self._held.popleft()
            self._lost += 1
        self._held.append(json.dumps({"step": step, **values}) + "\n")
        self._flush()

    def close(self) -> None:
        """Try once more to write what is held, and say what could not be."""
        self._flush()
        if self._held or self._lost:
            lost = len(self._held) + self._lost
            say(f"{self.path} lacks {counted(lost, 'row')} that could not be written")

    def _flush(self) -> None:
        """Write all rows that are held, if it can be done."""
        waiting = len(self._held) > 1  # a row before this one has failed already: not again at length
        for pause in (None,) if waiting else (*PAUSES, None):
            try:
                self._append("".join(self._held))
            except OSError as error:
                if pause is not None:
                    time.sleep(pause)
                elif not waiting:
                    say(
                        f"{self.path} can't be written ({error.strerror}); its rows are kept in memory, up to "
                        f"{MOST_HELD:,}, until it can"
                    )
            else:
                if waiting:
                    dropped = f", without {self._lost} for which there was no room" if self._lost else ""
                    say(f"{self.path} can be written again: {len(self._held)} rows caught up{dropped}")
                self._held.clear()
                self._lost = 0
                return

    def _append(self, text: str) -> None:
        """All of `text` or nothing of it, as far as the file system lets us take a part back."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            rest = memoryview((("\n" if self._torn else "") + text).encode())
            try:
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:
                self._torn = True
                os.ftruncate(descriptor, size)
                self._torn = False
                raise
        finally:
            os.close(descriptor)
        self._torn = False


def read_rows(path: Path, up_to: float = float("inf")) -> Iterator[dict[str, Any]]:
    """The rows of steps up to `up_to`; none where there is no file. A row that a kill has cut is left out."""
    for _, row in _rows(path):
        if row["step"] <= up_to:
            yield row


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of one a line; none where there is no file, and without lines that a kill has cut."""
    return (row for _, row in _lines(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((line, row) for line, row in _lines(path) if isinstance(row.get("step"), int | float))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield line, row


def _forget_after(path: Path, step: int) -> None:
    """Drop rows of steps after `step`: they were logged after the checkpoint that is resumed, and will come again."""
    if not path.exists():
        return
    kept = "".join(line if line.endswith("\n") else line + "\n" for line, row in _rows(path) if row["step"] <= step)
    if kept.encode() != path.read_bytes():
        write_text(path, kept)
