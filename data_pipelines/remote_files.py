"""How a file elsewhere is asked what it is and streamed from any byte: over HTTP, and by fsspec's file systems.

Nothing is tried twice here; `fetch` decides about that from the exceptions:

    FileNotFoundError, PermissionError, ValueError    another try would end the same way
    ChangedError                                      the file is another than the one that was begun
    any other Exception                               worth another try
"""

from __future__ import annotations

import base64
import http.client
import netrc
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from data_pipelines.urls import (
    folder_of,
    is_http,
    is_url,
    name_of,
    redact,
    scheme_of,
    without_credentials,
)

PIECE_BYTES = 1 << 18
_REQUEST_BYTES = 8 << 20  # every piece of an object store is a request
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # selfsight's own, by scheme
#: What fsspec's file systems call that which changes with a file, the surest first.
_VERSIONS = ("xet_hash", "ETag", "etag", "md5Hash", "sha256", "generation", "blob_id", "checksum")
_TIMES = ("LastModified", "last_modified", "last_commit", "mtime", "updated", "modified", "created")


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


def source_of(url: str, timeout_seconds: float) -> Source:
    """The source of a URL; ValueError or ImportError when this installation has none for it."""
    if not is_url(url):
        return LocalSource(url)
    return HttpSource(url, timeout_seconds) if is_http(url) else FsspecSource(url, timeout_seconds)


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
        _check_same(known, found)
        return found, self._body(start, found)

    def _body(self, position: int, found: FileState) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb", buffering=0) as file:
            file.seek(position)
            while piece := file.read(_REQUEST_BYTES):
                yield position, piece
                position += len(piece)
        _check_same(found, self.state())


class HttpSource:
    """A file behind HTTP: ranges where the server has them, user and password from the URL or ~/.netrc."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._url, self._credentials = without_credentials(url)
        self._timeout = timeout_seconds
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),  # to http and https only: there is no handler for anything else
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def state(self) -> FileState:
        """By a request for the first byte: unlike HEAD, links signed for GET permit it."""
        try:
            with self._get({"Range": "bytes=0-0"}) as response:
                return _state_of(response)
        except _NoSuchRangeError as error:
            return error.state  # of an empty file

    def stream(self, start: int, known: FileState) -> tuple[FileState, Iterator[tuple[int, bytes]]]:
        try:
            response = self._get({"Range": f"bytes={start}-"} if start else {})
        except _NoSuchRangeError as error:
            raise ChangedError(f"it has {error.state.size} bytes now, and {start} have come already") from None
        found = _state_of(response)
        with _closed_on_error(response):
            _check_same(known, found)
            position = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            if position and _range_of(response)[0] != position:
                raise RefusedError(f"asked for bytes from {start} it sends {response.headers['Content-Range']!r}")
        return found, self._body(response, position, found)

    @staticmethod
    def _body(response: Any, position: int, found: FileState) -> Iterator[tuple[int, bytes]]:
        with response:
            while piece := response.read1(PIECE_BYTES):
                yield position, piece
                position += len(piece)
        if found.size is not None and position < found.size:  # http.client takes a cut body for a whole one
            raise ConnectionError(f"the connection ended after {position} of {found.size} bytes")

    def _get(self, headers: dict[str, str]) -> Any:
        request = urllib.request.Request(self._url, headers={"Accept-Encoding": "identity", **headers})
        request.add_header("User-Agent", "selfsight")
        credentials = self._credentials or _netrc(urlsplit(self._url).hostname)
        if credentials is not None:
            text = base64.b64encode(":".join(credentials).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {text}")  # for this host, not for where it points
        try:
            response = self._opener.open(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _NoSuchRangeError(FileState(_range_of(error)[1], _version_of(error.headers))) from None
            raise _refusal(error.code, error.reason, error.headers.get("Retry-After")) from None
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise ValueError(
                f"the server sends it as {response.headers['Content-Encoding']}; have it send the plain file"
            )
        return response


@contextmanager
def _closed_on_error(response: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        response.close()
        raise


class _NoSuchRangeError(Exception):
    def __init__(self, state: FileState) -> None:
        super().__init__(state)
        self.state = state


def _refusal(status: int, reason: str, retry_after: str | None = None) -> Exception:
    """The exception for an HTTP status; see the head of this file."""
    text = f"{status} {reason}"
    if status in (404, 410):
        return FileNotFoundError(text)
    if status in (401, 403, 407):
        return PermissionError(text)
    if status in (408, 425, 429) or status >= 500:
        return RefusedError(text, float(retry_after) if retry_after and retry_after.isdigit() else None)
    return ValueError(text)


def _state_of(response: Any) -> FileState:
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        size = _range_of(response)[1]
    else:
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
    return FileState(size, _version_of(response.headers))


def _version_of(headers: Any) -> str | None:
    return next((f"{name} {headers[name]}" for name in ("ETag", "Last-Modified") if headers.get(name)), None)


def _range_of(response: Any) -> tuple[int | None, int | None]:
    """First byte and size of the whole out of `bytes 10-99/100`."""
    span, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = span.partition("-")[0]
    return (int(first) if first.isdigit() else None, int(size) if size.isdigit() else None)


def _netrc(host: str | None) -> tuple[str, str] | None:
    try:
        found = netrc.netrc().authenticators(host or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return None if found is None else (found[0], found[2] or "")


def _check_same(known: FileState, found: FileState) -> None:
    if known.size is not None and found.size is not None and known.size != found.size:
        raise ChangedError(f"it has {found.size} bytes and not {known.size}")
    if known.version is None or found.version is None or known.version == found.version:
        return
    if known.version.partition(" ")[0] == found.version.partition(" ")[0]:  # else told by different means
        raise ChangedError(f"its version is {found.version} and not {known.version}")


class FsspecSource:
    """A file of any of fsspec's file systems, with the credentials and settings that those find by themselves."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._fs, self._path = file_system(url)
        self._timeout = timeout_seconds

    def state(self) -> FileState:
        self._fs.invalidate_cache()  # else a listing of an hour ago might answer

        def ask() -> Iterator[Any]:
            yield _translated(self._fs.info, self._path)

        return state_of_info(next(_stall_guard(ask(), self._timeout)))

    def stream(self, start: int, known: FileState) -> tuple[FileState, Iterator[tuple[int, bytes]]]:
        found = self.state()
        _check_same(known, found)
        return found, self._body(start, found)

    def _body(self, position: int, found: FileState) -> Iterator[tuple[int, bytes]]:
        start = position

        def read() -> Iterator[Any]:
            with _translated(self._fs.open, self._path, "rb", cache_type="none") as file:
                file.seek(start)
                while piece := _translated(file.read, _REQUEST_BYTES):
                    yield piece

        for piece in _stall_guard(read(), self._timeout):
            yield position, piece
            position += len(piece)
        _check_same(found, self.state())  # the pieces are requests of their own, between which it may have changed


def state_of_info(info: dict[str, Any]) -> FileState:
    """What a file system's own description says."""
    version = next((f"{name} {info[name]}" for name in (*_VERSIONS, *_TIMES) if info.get(name) is not None), None)
    return FileState(info.get("size"), version)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it."""
    import fsspec

    scheme = scheme_of(url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = f"pip install 'selfsight[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise ValueError(f"{redact(url)}: {scheme}:// needs a package that is not installed: {extra}") from None
    except ValueError as error:
        raise ValueError(
            f"{redact(url)}: {scheme}:// is no known kind of place ({redact(str(error))}); known are local "
            "paths, https://, s3://, gs://, hf://datasets/ and what else fsspec has"
        ) from None


def _translated(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a file system; errors that no other try mends become those of the head of this file."""
    try:
        return call(*args, **kwargs)
    except (FileNotFoundError, PermissionError, ChangedError):
        raise
    except (IsADirectoryError, NotImplementedError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    except Exception as error:
        status = getattr(error, "status", None) or getattr(error, "code", None)
        status = status or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int) and 400 <= status < 600:
            raise _refusal(status, str(error)) from None
        if "Credentials" in type(error).__name__:  # botocore's and google-auth's share no base class with anything
            raise PermissionError(f"{type(error).__name__}: {error}") from None
        raise


def _stall_guard(items: Iterator[Any], seconds: float) -> Iterator[Any]:
    """The same items; TimeoutError when one of them is not there in time.

    A thread of its own takes them, as a file system's call cannot be interrupted. One that never returns is left
    behind, and ends with the process.
    """
    passed: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                passed.put((kind, value), timeout=1)
                return True
        return False

    def take() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
        except BaseException as error:
            put("error", error)
        else:
            put("end", None)

    threading.Thread(target=take, name="fsspec-read", daemon=True).start()
    try:
        while True:
            try:
                kind, value = passed.get(timeout=seconds)
            except queue.Empty:
                raise TimeoutError(f"nothing came for {seconds:g} seconds") from None
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
