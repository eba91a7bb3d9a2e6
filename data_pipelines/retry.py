"""What a network's file system fails at for a moment: tried again, and then ended with the file's name."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

_Result = TypeVar("_Result")
#: What may pass; a file that is gone or forbidden, or a full disk, stays so.
PASSING = frozenset(
    (
        errno.EIO,
        errno.ESTALE,  # NFS: the server has forgotten the handle; a new one may do
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EREMOTEIO,
    )
)
_PAUSES = (0.1, 1.0, 5.0, 15.0)  # seconds
_log = logging.getLogger(__name__)


def patiently(
    path: object,
    doing: str,
    action: Callable[[], _Result],
    between: Callable[[], object] | None = None,
    passing: frozenset[int] = PASSING,
) -> _Result:
    """`action()`, tried five times within 21 seconds if the file system fails; `between()` is called before each retry.

    Args:
        path: The file or folder, for messages.
        doing: What is done with it, for messages: "reading", "writing".

    Raises:
        OSError: It goes on failing, or fails with what does not pass; the message names the file. That is no property
            of a sample, so nobody should skip one for it.
    """
    try:
        return action()  # what follows takes longer than reading a thumbnail
    except OSError as error:
        failed = [error]

    def again() -> _Result:
        if failed:  # the first try, which was made
            raise failed.pop()
        return action()

    def prepare(state: RetryCallState) -> None:
        if between is not None and state.attempt_number > 1:
            between()

    attempts = Retrying(
        sleep=lambda seconds: time.sleep(seconds),
        stop=stop_after_attempt(len(_PAUSES) + 1),
        wait=wait_chain(*map(wait_fixed, _PAUSES)),
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and error.errno in passing),
        before=prepare,
        before_sleep=partial(_warn, path, doing),
        reraise=True,
    )
    try:
        return attempts(again)
    except OSError as error:
        if error.errno is None:
            raise
        tried = f" (tried {len(_PAUSES) + 1} times)" if error.errno in passing else ""
        raise OSError(error.errno, f"{error.strerror}, {doing}{tried}", str(path)) from error


def _warn(path: object, doing: str, state: RetryCallState) -> None:
    assert state.outcome is not None
    assert state.next_action is not None
    error = state.outcome.exception()
    assert isinstance(error, OSError)
    _log.warning("%s %s: %s; trying again in %g s", doing, path, error.strerror, state.next_action.sleep)
