"""How a run ends: a request to stop, and the exit codes by which a batch script knows what to do next."""

from __future__ import annotations

import signal
import traceback
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
#: Whose errors are messages to the user.
OUR_PACKAGES = ("pretrain", "launch", "data_pipelines", "eval", "slurm")


def is_user_error(error: BaseException) -> bool:
    """Whether an exception is a message to the user: about a file, or raised by one of our own packages."""
    if isinstance(error, OSError):
        return error.filename is not None or error.errno is None
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in OUR_PACKAGES


def exit_code(error: BaseException) -> int:
    """The code with which a process ends that lets an exception through."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return EXIT_USER_ERROR if is_user_error(error) else 1


@dataclass
class StopRequest:
    """Set by TERM, INT or USR1 (preemption, Ctrl-C, a time limit): finish the step, save, end.

    A second INT ends at once.
    """

    requested: bool = False
    by: str = ""  # the signal's name, where this process received one

    @classmethod
    def install(cls) -> StopRequest:
        request = cls()

        def on_signal(number: int, _: object) -> None:
            if number == signal.SIGINT and request.requested:
                raise KeyboardInterrupt
            request.requested, request.by = True, signal.Signals(number).name

        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, on_signal)
        except ValueError:  # not in the main thread (a notebook, a test): signals stay as they are
            pass
        return request
