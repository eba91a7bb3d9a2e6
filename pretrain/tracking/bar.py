"""The bar at a terminal, with all that is printed above it (imports no torch)."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pretrain.tracking.log_file import LoggedStream


class Bar:
    """One line at the bottom of the terminal. Lines are printed above it, and go into the run's log without it."""

    def __init__(self, step: int, total: int) -> None:
        self._streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, LoggedStream) and s.isatty()]
        self._terminals = [stream.terminal for stream in self._streams]
        console = Console(file=self._terminals[0], force_terminal=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("step"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[words]}", markup=False),
            console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._progress.add_task("step", completed=step, total=total, words="")
        for stream in self._streams:  # in place: loggers hold the stream itself
            stream.terminal = FileProxy(console, stream.terminal)  # type: ignore[assignment]
        self._progress.start()
        console.show_cursor(True)  # a process that is killed could not bring it back

    @staticmethod
    def fits() -> bool:
        """Whether a person is at a terminal that can show it, and what is printed there is logged."""
        return isinstance(sys.stdout, LoggedStream) and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, step: int, words: str) -> None:
        """Bring the line up to date."""
        self._progress.update(self._task, completed=step, words=words, refresh=True)

    def close(self) -> None:
        """Take the line away; the streams are the terminal's again."""
        for stream, terminal in zip(self._streams, self._terminals, strict=True):
            stream.flush()
            stream.terminal = terminal
        self._progress.stop()
