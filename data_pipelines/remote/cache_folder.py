"""The folder of a cache that many processes share: its entries, their locks, and the room they take.

An entry KEY is up to four files: `KEY` itself, whole; `KEY.json`, what it must be; `KEY.SIZE.BOOT.part`, as much as has
come of it; `KEY.lock`, which a process holds while it writes any of them, and whose time is the entry's last use. The
kernel frees a lock when its process ends, however it does, and the next one goes on with the part. A part is of one
boot of the machine: what a crash of the machine leaves in a file is not what was written.

Whoever has an entry open may go on reading when it is removed; its room is free once all have closed it. Files under
other names are not the cache's: they are neither counted nor removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_pipelines.files import sync
from data_pipelines.remote.fetch import pause

_LITTER_SECONDS = 3600.0  # temporary files of dead processes go after this
_LONGEST_POLL = 0.25
_SLACK_BYTES = 1 << 17  # on the disk beside an entry: its record, its lock
_TELL_SECONDS = 30.0  # of waiting for room
_OURS = re.compile(r"(?P<key>[0-9a-f]{64})(?:[.](?P<kind>json|lock)|[.](?P<size>[0-9]+)[.][0-9a-f]*[.]part)?")
_LITTER = re.compile(r"[.][0-9a-f]{64}[.]json[.].*[.]tmp")
_log = logging.getLogger(__name__)


class CacheFullError(OSError):
    """The cache has no room for a file, and none can be made."""


@dataclass
class _Entry:
    key: str
    num_bytes: int = 0  # on the disk, or still to come for a part
    to_come: int = 0  # of a part
    used: float = 0.0  # seconds since the epoch


class CacheFolder:
    """The entries below `path`, of `max_bytes` together at most."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes

    def data(self, key: str) -> Path:
        """Where an entry lies when it is whole."""
        return self.path / key

    def record(self, key: str) -> Path:
        """What the entry must be."""
        return self.path / f"{key}.json"

    def part(self, key: str, size: int) -> Path:
        """Where an entry of this size is written."""
        return self.path / f"{key}.{size}.{boot_id()}.part"

    def touch(self, key: str) -> None:
        """Note that the entry is in use."""
        with suppress(OSError):
            os.utime(self._lock(key))

    def remove(self, key: str) -> None:
        """Remove what there is of an entry but its lock, which the caller holds."""
        for path in (self.data(key), self.record(key), *self.path.glob(f"{key}.*.part")):
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold an entry against other processes and threads, as soon as those let go of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        wait = 0.01
        while (descriptor := self._try_lock(self._lock(key))) is None:
            pause(wait)
            wait = min(2 * wait, _LONGEST_POLL)
        try:
            yield
        finally:
            os.close(descriptor)

    def reserve(self, key: str, size: int) -> Path:
        """The part of an entry whose lock the caller holds, with room for `size` bytes in all; others make it.

        Entries go by the time of their last use, the oldest first, and never one that is being written. Where all
        the room is for such ones, of the bound or of the disk, waits for them.

        Raises:
            CacheFullError: The disk is too full, whatever is removed.
        """
        part = self.part(key, size)
        for other in self.path.glob(f"{key}.*.part"):
            if other != part:
                other.unlink(missing_ok=True)  # of another boot
        tell = time.monotonic() + _TELL_SECONDS
        while True:
            with self.locked("folder"):
                if self._make_room(key, size, size - (part.stat().st_size if part.exists() else 0)):
                    part.touch(mode=0o600)  # from now on the others count it
                    return part
            part.unlink(missing_ok=True)  # those who are waited for might wait for the room that it takes
            if time.monotonic() > tell:
                tell = float("inf")
                _log.warning(
                    "%s: no room for %s yet, as others are writing all of the %s that this process may use there; give "
                    "all jobs of a machine the same data.cache.max_bytes, or this one a data.cache.dir of its own",
                    self.path,
                    gigabytes(size),
                    gigabytes(self.max_bytes),
                )
            pause(_LONGEST_POLL)

    def finish(self, key: str, part: Path) -> None:
        """Make a whole part the entry; not while another process counts, which might see it under neither name."""
        with self.locked("folder"):
            part.replace(self.data(key))
        sync(self.path)

    def settle(self, key: str, size: int) -> None:
        """Make room, as far as others let go of it, for an entry that came whole before anyone knew its size."""
        with self.locked("folder"):
            self._make_room(key, size, 0)

    def make_room_on_disk(self, key: str, num_bytes: int) -> None:
        """Remove others than the entry `key` for this many bytes, as the disk is full although it said it was not.

        Raises:
            CacheFullError: There is nothing to remove.
        """
        freed = 0
        with self.locked("folder"):
            for entry in sorted(self._entries().values(), key=lambda entry: entry.used):
                if freed < num_bytes and entry.key != key and entry.num_bytes and self._evict(entry):
                    freed += entry.num_bytes
        if not freed:
            raise CacheFullError(self._full(num_bytes))

    def _make_room(self, key: str, size: int, still_to_come: int) -> bool:
        entries = self._entries()
        entries.pop(key, None)
        total = sum(entry.num_bytes for entry in entries.values())
        needed = still_to_come + sum(entry.to_come for entry in entries.values())  # of the disk
        needed += _SLACK_BYTES if still_to_come else 0
        waiting = False  # for entries that are being written
        for entry in sorted(entries.values(), key=lambda entry: entry.used):
            if total + size <= self.max_bytes and self._free() >= needed:
                return True
            if self._evict(entry):
                total -= entry.num_bytes
                needed -= entry.to_come
            elif entry.num_bytes:
                waiting = True
        if waiting:
            return total + size <= self.max_bytes and self._free() >= needed
        if still_to_come and self._free() < needed:
            raise CacheFullError(self._full(needed))
        return True

    def _full(self, num_bytes: int) -> str:
        return (
            f"{self.path}: the disk or quota is full ({gigabytes(self._free())} free), and {gigabytes(num_bytes)} must "
            "go there; free some, or choose another folder by data.cache.dir or SELFSIGHT_CACHE"
        )

    def _evict(self, entry: _Entry) -> bool:
        lock = self._lock(entry.key)
        descriptor = self._try_lock(lock)
        if descriptor is None:
            return False
        try:
            self.remove(entry.key)
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        return True

    def _entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for item in os.scandir(self.path):
            with suppress(FileNotFoundError):  # another process's, meanwhile removed or renamed
                status = item.stat()
                if _LITTER.fullmatch(item.name) and time.time() - status.st_mtime > _LITTER_SECONDS:
                    Path(item.path).unlink()
                ours = _OURS.fullmatch(item.name)
                if ours is None:
                    continue
                entry = entries.setdefault(ours["key"], _Entry(ours["key"]))
                if ours["kind"] == "lock":
                    entry.used = status.st_mtime
                elif ours["kind"] is None:
                    entry.num_bytes += max(int(ours["size"] or 0), status.st_size)
                    entry.to_come += max(0, int(ours["size"] or 0) - status.st_size)
        return entries

    def _free(self) -> int:
        return shutil.disk_usage(self.path).free

    def _lock(self, key: str) -> Path:
        return self.path / f"{key}.lock"

    def _try_lock(self, place: Path) -> int | None:
        """A descriptor that holds the lock until it is closed; None: somebody else does."""
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the file may have been removed before it was locked, and another one made in its place
            if os.fstat(descriptor).st_ino == place.stat().st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            os.close(descriptor)
            raise CacheFullError(
                f"files in {self.path} cannot be locked ({error.strerror}), and a cache is shared by locks; choose a "
                "folder on a disk of this machine by data.cache.dir or SELFSIGHT_CACHE"
            ) from error
        os.close(descriptor)
        return None


@cache
def boot_id() -> str:
    """Another text after each start of the machine; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")[:16]
    except OSError:
        return ""


def gigabytes(num_bytes: float) -> str:
    """`12.3 GB`, or smaller units for less."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{int(num_bytes)} bytes"
