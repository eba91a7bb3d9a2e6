"""How a run ends: a request to stop, and the exit codes by which a batch script knows what to do next."""

from __future__ import annotations

import signal
from dataclasses import dataclass

#: Asked to stop, wrote a checkpoint, wants to be continued: back into the queue, however often.
EXIT_STOPPED = 85
#: A rank hung and ended itself: back into the queue, a bounded number of times, as after any other death.
EXIT_HUNG = 86
#: Training went wrong (values that are not finite, or an alarm in `diagnostics.stop_on`): the same again would, too.
EXIT_TROUBLE = 87
#: No checkpoint could be written and `checkpoint.on_failure` is stop: somebody has to make room first.
EXIT_NOT_SAVED = 88
#: What was asked for can't be run; the command says why.
EXIT_USER_ERROR = 2


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
