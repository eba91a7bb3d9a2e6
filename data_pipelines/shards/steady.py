"""Reads of shards that a network's file system fails at for a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from data_pipelines.remote.remote_files import Shard
from data_pipelines.retry import patiently

_Result = TypeVar("_Result")


def steadily(path: Shard, read: Callable[[], _Result], reopen: Callable[[], None]) -> _Result:
    """`read()`, tried five times within 21 seconds if the file system fails; `reopen()` is called before each retry.

    Raises:
        OSError: It goes on failing, or fails with what does not pass; the message names the file. That is no property
            of a sample, so nobody should skip one for it.
    """
    return patiently(path, "reading", read, reopen)
