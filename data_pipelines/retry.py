"""What a network's file system fails at for a moment: tried again, and then ended with the file's name."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

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
        OSError: It goes on failing, or fails with what does not pass; the message names the file.
    """
    for pause in (*_PAUSES, None):
        try:
            return action()
        except OSError as error:
            if error.errno is None:
                raise
            if pause is None or error.errno not in passing:
                tried = "" if pause is not None else f" (tried {len(_PAUSES) + 1} times)"
                raise OSError(error.errno, f"{error.strerror}, {doing}{tried}", str(path)) from error
            _log.warning("%s %s: %s; trying again in %g s", doing, path, error.strerror, pause)
            time.sleep(pause)
            if between is not None:
                between()
    raise AssertionError("the last try returns or raises")
