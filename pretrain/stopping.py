"""A request to stop: finish the step, save, end, and be continued later."""

from __future__ import annotations

import signal
from dataclasses import dataclass

#: Exit code of a run that was asked to stop, wrote a checkpoint and wants to be continued.
EXIT_STOPPED = 85


@dataclass
class StopRequest:
    """Set by TERM, INT or USR1 (preemption, Ctrl-C, a time limit): finish the step, save, end.

    A second INT ends at once.
    """

    requested: bool = False

    @classmethod
    def install(cls) -> StopRequest:
        request = cls()

        def on_signal(number: int, _: object) -> None:
            if number == signal.SIGINT and request.requested:
                raise KeyboardInterrupt
            request.requested = True

        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, on_signal)
        except ValueError:  # not in the main thread (a notebook, a test): signals stay as they are
            pass
        return request
