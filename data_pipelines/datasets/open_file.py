"""A shard that is open, here or in the cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.remote.remote_files import RemoteFile, Shard
from data_pipelines.shards.shard import open_shard

if TYPE_CHECKING:  # imported where shards come through it
    from data_pipelines.remote.cache import Cache

_KEEP_SECONDS = 5.0


class OpenFile:
    """A file descriptor that closes once its last user lets go, which another thread's read may be."""

    def __init__(self, shard: Shard, fetched: RemoteFile | None, cache: Cache | None) -> None:
        self._fetched, self._cache, self._kept = fetched, cache, time.monotonic()
        if fetched is not None and cache is not None:
            self.descriptor = cache.open(fetched)
        else:
            assert isinstance(shard, Path)
            self.descriptor = open_shard(shard)

    def keep(self) -> None:
        """Let the cache know, now and then, that the file is in use."""
        if self._fetched is not None and self._cache is not None and time.monotonic() - self._kept > _KEEP_SECONDS:
            self._kept = time.monotonic()
            self._cache.touch(self._fetched)

    def is_removed(self) -> bool:
        """Whether the cache has made room of it."""
        return self._fetched is not None and os.fstat(self.descriptor).st_nlink == 0

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
