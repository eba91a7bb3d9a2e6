"""`RUN/log.txt`: what rank 0 showed at the terminal, kept over all starts of a run (imports no torch)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

LOG = "log.txt"


class LoggedStream:
    """A stream of the terminal whose text also goes into a file; a file that can't be written changes nothing."""

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self.terminal, self.file = terminal, file

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.file.write(text)
            if "\n" in text:
                self.file.flush()
        return self.terminal.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.file.flush()
        self.terminal.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Add what is printed here, warnings among it, to the log of the run in `folder`."""
    try:
        file = (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        print(f"{folder / LOG} can't be written ({error.strerror}); training goes on without it", flush=True)
        file = Path(os.devnull).open("a", encoding="utf-8")  # noqa: SIM115
    before = sys.stdout, sys.stderr
    file.write(f"--- started {time.strftime('%Y-%m-%d %H:%M:%S %z')} ---\n")
    sys.stdout, sys.stderr = (LoggedStream(stream, file) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        with suppress(OSError):
            file.close()


def say_in_log(text: str) -> None:
    """A line for the log alone, where the terminal shows the same in another way."""
    if isinstance(sys.stdout, LoggedStream):
        with suppress(OSError, ValueError):
            sys.stdout.file.write(f"{text}\n")
            sys.stdout.file.flush()
