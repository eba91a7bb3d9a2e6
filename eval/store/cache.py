"""Features of earlier commands, kept within bounds: what a probe has computed, the next one maps.

An entry KEY of the folder is `KEY/`, the arrays of `MappedFeatures`; `KEY.part/`, as far as they have come; and
`KEY.lock`, which whoever makes the entry holds alone and whoever reads it shares, and whose time is the entry's last
use. The kernel frees a lock when its process ends, however it does, and the next one goes on with the part.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipelines.files import parse_json, sync, write_json
from data_pipelines.remote.cache_folder import gigabytes
from data_pipelines.remote.fetch import pause
from eval.store.layout import Layout
from eval.store.matrix import MappedFeatures

LIMIT = "SELFSIGHT_FEATURE_CACHE_GB"
DEFAULT_GIGABYTES = 20.0
RESERVED = "reserved.json"
_SLACK_BYTES = 1 << 20  # of a disk, beside an entry
#: What a damaged entry is noticed by.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class NoRoomError(Exception):
    """The cache can't hold an entry; the message says why, in bytes."""


class FeatureCache:
    """Mapped features by what they are of; for any number of processes.

    Args:
        folder: Default: `features` in $SELFSIGHT_CACHE (~/.cache/selfsight).
        max_bytes: Of all entries together; default: $SELFSIGHT_FEATURE_CACHE_GB, or 20 GB. The least recently used go,
            but none that anybody has open.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int | None = None) -> None:
        root = Path(os.environ.get("SELFSIGHT_CACHE") or Path.home() / ".cache" / "selfsight").expanduser()
        self.folder = folder or root / "features"
        self.max_bytes = limit_of(os.environ.get(LIMIT)) if max_bytes is None else max_bytes

    def open(
        self,
        key: dict[str, Any],
        layout: Layout,
        num_bytes: int,
        make: Callable[[Path, str], None],
        say: Callable[[str], None] = lambda line: None,
    ) -> MappedFeatures:
        """The entry of this key, which `make(folder, digest)` writes where there is none, or a damaged one.

        `num_bytes`: it takes at most. `make` finds what an earlier one, which was ended, has left in the folder.

        Raises NoRoomError where the bound or the disk does not allow it, or the folder can't be used.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        name = digest[:32]
        if num_bytes > self.max_bytes:
            raise NoRoomError(
                f"they would take {gigabytes(num_bytes)} ({num_bytes:,} bytes), and {LIMIT} allows the cache "
                f"{gigabytes(self.max_bytes)}"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = self._lock(name, fcntl.LOCK_SH, say)
        except OSError as error:
            raise NoRoomError(f"the cache in {self.folder} can't be used ({error.strerror or error})") from error
        found = self._found(name, layout, digest)
        if found is None:
            os.close(descriptor)
            descriptor = self._lock(name, fcntl.LOCK_EX, say)
            try:
                found = self._found(name, layout, digest)  # another process's, made meanwhile
                if found is None:
                    self._make(name, digest, num_bytes, make)
                    found = MappedFeatures(self.folder / name, layout, digest)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            except BaseException:
                os.close(descriptor)
                raise
        weakref.finalize(found.features, os.close, descriptor)  # as long as anybody reads them
        return found

    def _found(self, name: str, layout: Layout, digest: str) -> MappedFeatures | None:
        """A whole entry, used from now on; None where there is none, or a damaged one."""
        try:
            found = MappedFeatures(self.folder / name, layout, digest)
            os.utime(self.folder / f"{name}.lock")
            return found
        except DAMAGE:
            return None

    def _make(self, name: str, digest: str, num_bytes: int, make: Callable[[Path, str], None]) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        part = self.folder / f"{name}.part"
        with self._alone():
            self._make_room(name, num_bytes)
            part.mkdir(exist_ok=True)
            write_json(part / RESERVED, num_bytes)  # from now on the others count it
        make(part, digest)
        (part / RESERVED).unlink()
        part.rename(self.folder / name)
        sync(self.folder)

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Remove the least recently used of the others until there is room; raises NoRoomError where there is none."""
        others = {entry: size for entry, size in self._sizes().items() if entry != name}
        to_come = num_bytes - _size(self.folder / f"{name}.part")

        def fits() -> bool:
            free = shutil.disk_usage(self.folder).free
            return sum(others.values()) + num_bytes <= self.max_bytes and free >= to_come + _SLACK_BYTES

        for entry in sorted(others, key=self._last_use):
            if fits():
                return
            if self._evict(entry):
                del others[entry]
        if not fits():
            held = sum(others.values())
            raise NoRoomError(
                f"they would take {gigabytes(num_bytes)} ({num_bytes:,} bytes); of the {gigabytes(self.max_bytes)} "
                f"that {LIMIT} allows, others have {gigabytes(held)} in use, and the disk of {self.folder} has "
                f"{gigabytes(shutil.disk_usage(self.folder).free)} free"
            )

    def _evict(self, name: str) -> bool:
        """Remove an entry; False where somebody has it open."""
        lock = self.folder / f"{name}.lock"
        descriptor = _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is None:
            return False
        try:
            for place in (self.folder / name, self.folder / f"{name}.part"):
                shutil.rmtree(place, ignore_errors=True)
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        return True

    def _sizes(self) -> dict[str, int]:
        """Bytes of each entry, of one that is being made all that it will have."""
        sizes: dict[str, int] = {}
        for place in self.folder.iterdir():
            if place.is_dir():
                name = place.name.removesuffix(".part")
                sizes[name] = sizes.get(name, 0) + max(_size(place), _reserved(place))
        return sizes

    def _last_use(self, name: str) -> float:
        try:
            return (self.folder / f"{name}.lock").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _lock(self, name: str, kind: int, say: Callable[[str], None]) -> int:
        """A descriptor that holds an entry until it is closed, after whoever holds it against us."""
        waited = False
        while (descriptor := _locked(self.folder / f"{name}.lock", kind | fcntl.LOCK_NB)) is None:
            if not waited:
                say("waiting for another process, which makes the same features")
            waited = True
            pause(0.2)
        return descriptor

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While room is counted."""
        descriptor = self._lock("folder", fcntl.LOCK_EX, lambda line: None)
        try:
            yield
        finally:
            os.close(descriptor)


def limit_of(text: str | None) -> int:
    """Bytes of what the environment says in GB; ValueError for what is no number of them."""
    try:
        gigabytes_ = DEFAULT_GIGABYTES if not text else float(text)
    except ValueError:
        gigabytes_ = -1.0
    if not 0 <= gigabytes_ < float("inf"):
        raise ValueError(f"{LIMIT} is {text!r}; it is the bound of the cache of features in GB, 20 unless it is set")
    return int(gigabytes_ * 1e9)


def _locked(place: Path, kind: int) -> int | None:
    """A descriptor that holds the lock until it is closed; None: somebody else does."""
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind)
        # the file may have been removed before it was locked, and another one made in its place
        if os.fstat(descriptor).st_ino == place.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, which others may be changing."""
    total = 0
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def _reserved(folder: Path) -> int:
    with suppress(OSError, ValueError, TypeError):
        return int(parse_json((folder / RESERVED).read_text(encoding="utf-8")))
    return 0
