"""Ending a process that hangs: a lost peer can leave a collective waiting for ever, on every other rank."""

from __future__ import annotations

import faulthandler
import sys


class Watchdog:
    """Unless fed again within `seconds`, prints every thread's stack and ends the process with exit code 1.

    The launcher then ends the other ranks. A C thread does it, so that a process stuck inside a collective or a
    driver ends too. It watches inside its `with` block; with None it never barks.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def feed(self) -> None:
        """Start counting anew."""
        if self.seconds is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def __enter__(self) -> Watchdog:
        self.feed()
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
