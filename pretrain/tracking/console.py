"""Lines for the person who watches."""

from __future__ import annotations

from contextlib import suppress


def say(text: str) -> None:
    """Print a line at once; a log file that can't be written, as on a full disk, is no reason to stop training.

    What could not be written stays in the stream's buffer and goes out with a later line.
    """
    with suppress(OSError):
        print(text, flush=True)
