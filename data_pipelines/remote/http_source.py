"""Files behind HTTP: ranges where the server has them, and every way in which an answer may be cut noticed."""

from __future__ import annotations

import base64
import http.client
import netrc
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from data_pipelines.remote.remote_files import ChangedError, FileState, RefusedError, check_same, refusal
from data_pipelines.remote.urls import without_credentials

_PIECE_BYTES = 1 << 18


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
            check_same(known, found)
            position = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            if position and _range_of(response)[0] != position:
                raise RefusedError(f"asked for bytes from {start} it sends {response.headers['Content-Range']!r}")
        return found, self._body(response, position, found)

    @staticmethod
    def _body(response: Any, position: int, found: FileState) -> Iterator[tuple[int, bytes]]:
        with response:
            while piece := response.read1(_PIECE_BYTES):
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
            raise refusal(error.code, error.reason, error.headers.get("Retry-After")) from None
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
