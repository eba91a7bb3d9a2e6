"""Reads that a network's file system fails at for a moment: tried again, and then ended with the file's name."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from data_pipelines.remote.remote_files import Shard

_Result = TypeVar("_Result")
#: What may pass; a file that is gone or forbidden stays so.
_PASSING = frozenset(
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


def steadily(path: Shard, read: Callable[[], _Result], reopen: Callable[[], None]) -> _Result:
    """`read()`, tried five times within 21 seconds if the file system fails; `reopen()` is called before each retry.

    Raises:
        OSError: It goes on failing, or fails with what does not pass; the message names the file. That is no property
            of a sample, so nobody should skip one for it.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno is None:
                raise
            if pause is None or error.errno not in _PASSING:
                tried = "" if pause is not None else f" (tried {len(_PAUSES) + 1} times)"
                raise OSError(error.errno, f"{error.strerror}, reading{tried}", str(path)) from error
            _log.warning("reading %s: %s; trying again in %g s", path, error.strerror, pause)
            time.sleep(pause)
            reopen()
    raise AssertionError("the last try returns or raises")
