"""Where shards lie: what tells a changed one from the same one, and a descriptor to read it by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data_pipelines.remote.remote_files import Shard

_STAT_THREADS = 16  # on a network's file system each answer takes its time
_FEW = 64


class Identity(NamedTuple):
    """What a stored index must agree with to be a shard's own."""

    size: int  # bytes
    stamp: int | None  # changes with the shard: nanoseconds of the last change here; None: unknown, the size decides


def identify(shard: Path) -> Identity:
    """Size and stamp of a shard as it is now."""
    status = shard.stat()
    return Identity(status.st_size, status.st_mtime_ns)


def identify_all(shards: Sequence[Path]) -> list[Identity]:
    """The same of many shards, several at a time."""
    if len(shards) <= _FEW:
        return [identify(shard) for shard in shards]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return list(pool.map(identify, shards, chunksize=_FEW))


def open_shard(shard: Path) -> int:
    """A descriptor of a local file with the shard's bytes, for the caller to close."""
    return os.open(shard, os.O_RDONLY | os.O_CLOEXEC)


class ShardChangedError(OSError):
    """A shard is not the one that was indexed."""

    def __init__(self, shard: Shard, what: str) -> None:
        super().__init__(
            f"{shard} {what} since it was indexed: something writes to the data of a run. Bring the shard back as it "
            "was, or start anew with what it is now"
        )
