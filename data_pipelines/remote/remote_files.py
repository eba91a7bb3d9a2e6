"""What is known of a file elsewhere, and the seam to where it comes from.

A source tries nothing twice; `fetch` decides about that from the exceptions:

    FileNotFoundError, PermissionError, ValueError    another try would end the same way
    ChangedError                                      the file is another than the one that was begun
    any other Exception                               worth another try
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data_pipelines.remote.urls import check_names, folder_of, is_url, name_of, redact

REQUEST_BYTES = 8 << 20  # every piece of an object store is a request


@dataclass(frozen=True)
class FileState:
    """What a source says of a file: its size in bytes, and a text that changes with the file; None: it does not say."""

    size: int | None = None
    version: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere, and what of it was told by others than its source.

    As text it is redacted; `url` holds what opens it and is not to be shown. A local path stands for a file that is
    staged.
    """

    url: str = field(repr=False)
    state: FileState = FileState()
    sha256: str | None = None  # of its bytes, in hexadecimal digits

    def __post_init__(self) -> None:
        if is_url(self.url):
            check_names([self.name], self.parent)
        if self.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):  # it names the cache's entry
            raise ValueError(f"{self}: its SHA-256 is told as {self.sha256[:100]!r}; publish it again")

    @property
    def name(self) -> str:
        return name_of(self.url)

    @property
    def parent(self) -> str:
        """The folder, to be shown."""
        return redact(folder_of(self.url)).removesuffix("?***").rstrip("/")

    def __str__(self) -> str:
        return redact(self.url)


#: A local tar, or one that is fetched.
Shard = Path | RemoteFile


class ChangedError(OSError):
    """The file is no longer the one that was begun."""


class RefusedError(OSError):
    """The server answered with a status that a later try may not meet; `after`: the seconds it asks to wait."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Source(Protocol):
    """Where a file comes from."""

    def state(self) -> FileState:
        """Ask what the file is."""

    def stream(self, start: int, known: FileState) -> tuple[FileState, Iterator[tuple[int, bytes]]]:
        """What the file is, and (offset, bytes) in order to its end: from `start` where that can be had, else from 0.

        Raises ChangedError where it is not `known`.
        """


def mtime_version(nanoseconds: int) -> str:
    """The version of a local file that was last changed then."""
    return f"mtime_ns {nanoseconds}"


class LocalSource:
    """A file of a mounted file system that is slow."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def state(self) -> FileState:
        status = self._path.stat()
        return FileState(status.st_size, mtime_version(status.st_mtime_ns))

    def stream(self, start: int, known: FileState) -> tuple[FileState, Iterator[tuple[int, bytes]]]:
        found = self.state()
        check_same(known, found)
        return found, self._body(start, found)

    def _body(self, position: int, found: FileState) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb", buffering=0) as file:
            file.seek(position)
            while piece := file.read(REQUEST_BYTES):
                yield position, piece
                position += len(piece)
        check_same(found, self.state())


def check_same(known: FileState, found: FileState) -> None:
    """Raise ChangedError where two descriptions of a file contradict each other."""
    if known.size is not None and found.size is not None and known.size != found.size:
        raise ChangedError(f"it has {found.size} bytes and not {known.size}")
    if known.version is None or found.version is None or known.version == found.version:
        return
    if known.version.partition(" ")[0] == found.version.partition(" ")[0]:  # else told by different means
        raise ChangedError(f"its version is {found.version} and not {known.version}")


def refusal(status: int, reason: str, retry_after: str | None = None) -> Exception:
    """The exception for an HTTP status; see the head of this file."""
    text = f"{status} {reason}"
    if status in (404, 410):
        return FileNotFoundError(text)
    if status in (401, 403, 407):
        return PermissionError(text)
    if status in (408, 425, 429) or status >= 500:
        return RefusedError(text, float(retry_after) if retry_after and retry_after.isdigit() else None)
    return ValueError(text)
