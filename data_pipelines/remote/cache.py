"""Files from elsewhere on this machine's disk: fetched once for all its processes, checked, and within bounds."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.files import parse_json, write_json
from data_pipelines.remote.cache_folder import CacheFolder, boot_id, gigabytes
from data_pipelines.remote.fetch import FetchError, Patience, pieces, state
from data_pipelines.remote.remote_files import ChangedError, FileState, RemoteFile
from data_pipelines.remote.urls import is_url, without_credentials

DEFAULT_MAX_BYTES = 200 * 10**9
_HASH_BYTES = 1 << 22
_log = logging.getLogger(__name__)


@dataclass
class CacheStatistics:
    """What a process has asked of its cache."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    wait_seconds: float = 0.0  # of readers, summed over them; what is fetched ahead keeps none waiting


class Cache:
    """A bounded folder of files fetched from elsewhere; safe for any number of threads, processes and jobs.

    A file is known by its checksum, or by its URL and version, never by its name. Of those who want the same one, one
    fetches it and the others wait; one that is killed leaves a part behind with which the next one goes on. The least
    recently used go when there is no more room; whoever has one open may go on reading it.

    Args:
        folder: Default: see `default_folder`.
        max_bytes: Of all entries together.
        patience: With the sources.
    """

    def __init__(
        self, folder: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES, patience: Patience | None = None
    ) -> None:
        self.folder = CacheFolder(folder or default_folder(), max_bytes)
        self.patience = patience or Patience()
        self.statistics = CacheStatistics()
        self._states: dict[str, FileState] = {}
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        return self.folder.max_bytes

    def open(self, file: RemoteFile) -> int:
        """A descriptor of the file, for the caller to close; fetches the file first if it is not here.

        Raises:
            FetchError, FileNotFoundError, PermissionError: It cannot be had.
            ChangedError: It is another than it was said to be, or than it was when this cache first asked.
            CacheFullError: There is no room for it.
            ValueError: It is larger than the whole cache.
        """
        began = time.perf_counter()
        descriptor, hit = self._open(file)
        with self._lock:
            self.statistics.hits += hit
            self.statistics.misses += not hit
            self.statistics.wait_seconds += time.perf_counter() - began
        return descriptor

    def fetch(self, file: RemoteFile) -> None:
        """Bring a file here before anyone asks for it, or note that it is wanted still; raises as `open` does."""
        os.close(self._open(file)[0])

    def path(self, file: RemoteFile) -> Path:
        """Where a file lies that was just fetched, to be opened at once: it may be removed at any time."""
        self.fetch(file)
        return self.folder.data(key_of(self.settled(file)))

    def link(self, file: RemoteFile, place: Path) -> None:
        """Give a file one more name, `place`, on the same disk; it lasts there when the cache removes it."""
        key = key_of(self.settled(file))
        while True:
            self.fetch(file)
            with self.folder.locked(key):
                try:
                    return os.link(self.folder.data(key), place)
                except FileNotFoundError:
                    if not place.parent.is_dir():
                        raise
                    continue  # removed meanwhile
                except OSError:  # a file system without links
                    shutil.copy2(self.folder.data(key), place)
                    return None

    def touch(self, file: RemoteFile) -> None:
        """Note that a file is in use; of one whose version nobody has asked for yet there is nothing to note."""
        known = self._settled_already(file)
        if known is not None:
            self.folder.touch(key_of(known))

    def size(self, file: RemoteFile) -> int | None:
        """The bytes of a file; asks the source if nobody has said so."""
        return file.state.size if file.state.size is not None else self.settled(file).state.size

    def _open(self, file: RemoteFile) -> tuple[int, bool]:
        """A descriptor, and whether the file was here already."""
        file = self.settled(file)
        key = key_of(file)
        descriptor = self._open_entry(key)
        if descriptor is not None:
            return descriptor, True
        self._check_size(file, file.state.size or 0)
        with self.folder.locked(key):
            descriptor = self._open_entry(key)  # another process may have fetched it meanwhile
            if descriptor is None:
                descriptor = self._recheck(key, file)
            if descriptor is not None:
                return descriptor, True
            self._bring(file, key)
            return os.open(self.folder.data(key), os.O_RDONLY | os.O_CLOEXEC), False

    def _check_size(self, file: RemoteFile, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{file} has {gigabytes(num_bytes)} and the cache at most {gigabytes(self.max_bytes)}; raise "
                "data.cache.max_bytes, or pack into smaller shards"
            )

    def settled(self, file: RemoteFile) -> RemoteFile:
        """The file with a version, and the same one each time; asks the source where nobody has told it."""
        known = self._settled_already(file)
        if known is not None:
            return known
        found = state(file.url, self.patience)
        if None not in (file.state.size, found.size) and file.state.size != found.size:
            raise ChangedError(f"{file} has {found.size} bytes and should have {file.state.size}")
        self._states[file.url] = found
        return _with_state(file, found)

    def _settled_already(self, file: RemoteFile) -> RemoteFile | None:
        if file.sha256 is not None or file.state.version is not None:
            return file
        found = self._states.get(file.url)
        return None if found is None else _with_state(file, found)

    def _open_entry(self, key: str) -> int | None:
        """A descriptor of an entry that is here, and as it was written."""
        try:
            descriptor = os.open(self.folder.data(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        record = self._read_record(key)
        if record is not None and record == {**record, **_stamp(os.fstat(descriptor))}:
            self.folder.touch(key)
            return descriptor
        os.close(descriptor)
        return None

    def _recheck(self, key: str, file: RemoteFile) -> int | None:
        """The same after a restart of the machine or another's write, by the checksum; removes it if that is wrong."""
        place, record = self.folder.data(key), self._read_record(key)
        if not place.exists():
            return None
        if record is not None and place.stat().st_size == record.get("size") and _sha256(place) == record.get("sha256"):
            write_json(self.folder.record(key), record | _stamp(place.stat()))
            return self._open_entry(key)
        _log.warning("%s is damaged, and fetched again: %s", place, file)
        self.folder.remove(key)
        return None

    def _bring(self, file: RemoteFile, key: str) -> None:
        """Fetch an entry whose lock is held, as far as it is not here yet."""
        size = file.state.size
        part = self.folder.reserve(key, size or 0)
        digest, num_bytes = hashlib.sha256(), 0
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            while piece := os.pread(descriptor, _HASH_BYTES, num_bytes):
                digest.update(piece)
                num_bytes += len(piece)
            start = num_bytes
            for offset, piece in pieces(file.url, self.patience, start=start, known=file.state):
                if offset != num_bytes:
                    os.ftruncate(descriptor, 0)
                    digest = hashlib.sha256()
                self._check_size(file, offset + len(piece))
                self._write(descriptor, key, offset, piece, (size or 0) - offset)
                digest.update(piece)
                num_bytes = offset + len(piece)
                with self._lock:
                    self.statistics.fetched_bytes += len(piece)
            os.fsync(descriptor)
            status = os.fstat(descriptor)
        except ChangedError:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        if file.sha256 is not None and digest.hexdigest() != file.sha256:
            part.unlink()
            if start:  # perhaps it was the part that was bad
                return self._bring(file, key)
            raise FetchError(
                f"{file} has other bytes than it was published with (SHA-256 {digest.hexdigest()} and not "
                f"{file.sha256}); publish it, or its dataset.json, again"
            )
        written = {"size": num_bytes, "sha256": digest.hexdigest(), **_stamp(status)}
        write_json(self.folder.record(key), {"of": str(file), **written})
        self.folder.finish(key, part)
        if size is None:  # nothing could be reserved for it
            self.folder.settle(key, num_bytes)
        return None

    def _write(self, descriptor: int, key: str, offset: int, piece: bytes, still_to_come: int) -> None:
        view = memoryview(piece)
        while view:
            try:
                written = os.pwrite(descriptor, view, offset)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.folder.make_room_on_disk(key, max(still_to_come, len(view)))  # or raises
                written = 0
            view, offset = view[written:], offset + written

    def _read_record(self, key: str) -> dict[str, Any] | None:
        try:
            record = parse_json(self.folder.record(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None


def default_folder(stage: bool = False) -> Path:
    """`SELFSIGHT_CACHE`; or, to stage, a folder in the job's or the machine's own scratch; or `~/.cache/selfsight`."""
    chosen = os.environ.get("SELFSIGHT_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "shards"
    if stage:
        scratch = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"selfsight-{os.getuid()}"
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        if scratch.stat().st_uid != os.getuid():  # in /tmp, anyone may make one by this name
            raise PermissionError(f"{scratch} belongs to somebody else; set SELFSIGHT_CACHE to a folder of your own")
        return scratch / "shards"
    return Path.home() / ".cache" / "selfsight" / "shards"


def key_of(file: RemoteFile) -> str:
    """What a file is known by: its checksum, or its URL without credentials, size and version."""
    if file.sha256 is not None:
        return file.sha256.lower()
    url = without_credentials(file.url)[0] if is_url(file.url) else file.url
    identity = f"{url}\0{file.state.size}\0{file.state.version}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(identity).hexdigest()


def _with_state(file: RemoteFile, found: FileState) -> RemoteFile:
    """With what its source says, and the size that is known already where that says none."""
    return replace(file, state=FileState(file.state.size if found.size is None else found.size, found.version))


def _stamp(status: os.stat_result) -> dict[str, Any]:
    """What changes when an entry does, or may have."""
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "boot": boot_id()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
