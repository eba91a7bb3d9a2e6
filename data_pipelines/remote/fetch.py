"""Files from elsewhere, byte for byte: continued after a cut, tried again with back-off, and with a clear end."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from data_pipelines.remote.remote_files import ChangedError, FileState, LocalSource, RefusedError, Source
from data_pipelines.remote.urls import is_http, is_url, redact

_LONGEST_WAIT = 60.0
_SURE = 2  # times in a row that a file must be found changed
_POLL_SECONDS = 0.1  # of who waits for a source, whether anybody wants it still
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class FetchError(OSError):
    """A file could not be had; the message names it, how often it was tried, and the last reason."""


class CancelledError(Exception):
    """Nobody wants the file any more."""


_thread = threading.local()


def cancel_on(event: threading.Event) -> None:
    """All that this thread fetches, or waits for, ends with CancelledError once the event is set."""
    _thread.cancel = event


def pause(seconds: float) -> None:
    """Sleep; raises CancelledError as soon as the thread's event is set."""
    event = getattr(_thread, "cancel", None)
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise CancelledError


def interruptible(items: Iterator[_Item], seconds: float) -> Iterator[_Item]:
    """The same items; TimeoutError when one of them is not there in time, CancelledError as `pause` raises it.

    A thread of its own takes them, as neither a file system's call nor a read from a socket can be interrupted. One
    that never returns is left behind, and ends with the process.
    """
    passed: queue.Queue[tuple[_Item | None, BaseException | None]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: _Item | None, error: BaseException | None = None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                return passed.put((item, error), timeout=_POLL_SECONDS)

    def take() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, StopIteration())

    threading.Thread(target=take, name="source", daemon=True).start()
    try:
        while True:
            item, error = _taken(passed, time.monotonic() + seconds, seconds)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stop.set()


def _taken(
    passed: queue.Queue[tuple[_Item | None, BaseException | None]], until: float, seconds: float
) -> tuple[_Item | None, BaseException | None]:
    while True:
        pause(0)
        with suppress(queue.Empty):
            return passed.get(timeout=max(0.0, min(_POLL_SECONDS, until - time.monotonic())))
        if time.monotonic() >= until:
            raise TimeoutError(f"nothing came for {seconds:g} seconds")


@dataclass(frozen=True)
class Patience:
    """How long a source that fails is borne with.

    Args:
        tries: Failures in a row, none of them a byte further than the ones before, that end it.
        timeout_seconds: Without a byte, after which a connection counts as failed.
        backoff_seconds: The wait after the first failure. It doubles with each, up to a minute, and is drawn from
            half of that to the whole, so that many readers do not come back at once.
    """

    tries: int = 8
    timeout_seconds: float = 60.0
    backoff_seconds: float = 0.5


class _Attempts:
    """The account of one file's failures."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._url, self._patience = url, patience
        self._random = random.Random(f"{os.getpid()} {url}")  # another for every process: they must not agree
        self._failures = 0

    def progress(self) -> None:
        """Bytes came that had not come before."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Wait until it is time for the next try; raises what ends the fetch when there is none."""
        shown = redact(self._url)
        reason = redact(f"{type(error).__name__}: {error}" if not isinstance(error, RefusedError) else str(error))
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{shown} does not exist ({reason}); see to its name") from None
        if isinstance(error, PermissionError):
            raise PermissionError(
                f"{shown} may not be read ({reason}); give the credentials its file system looks for "
                "(~/.netrc for https, AWS_* for s3, gcloud's for gs, HF_TOKEN for hf)"
            ) from None
        if isinstance(error, ValueError):
            raise FetchError(f"{shown} cannot be fetched ({reason})") from None
        if isinstance(error, TypeError | AttributeError | NameError | AssertionError):
            raise error  # ours, or a library's bug: no weather
        self._failures += 1
        if self._failures >= self._patience.tries:
            raise FetchError(
                f"{shown} could not be fetched: {self._failures} tries in a row failed, the last one with {reason}. "
                "Start again when it can be reached: what has come already is kept"
            ) from None
        wait = min(_LONGEST_WAIT, self._patience.backoff_seconds * 2 ** (self._failures - 1))
        wait *= self._random.uniform(0.5, 1)
        if isinstance(error, RefusedError) and error.after is not None:
            wait = max(wait, min(error.after, _LONGEST_WAIT))
        pause(wait)


def source_of(url: str, timeout_seconds: float) -> Source:
    """The source of a URL; ValueError or ImportError when this installation has none for it."""
    if not is_url(url):
        return LocalSource(url)
    if is_http(url):  # imported here: who reads local shards needs neither
        from data_pipelines.remote.http_source import HttpSource

        return HttpSource(url, timeout_seconds)
    from data_pipelines.remote.fsspec_source import FsspecSource

    return FsspecSource(url)


def retried(url: str, ask: Callable[[], _Result], patience: Patience) -> _Result:
    """What `ask` returns, which may fail some times; raises as `pieces` does."""
    attempts = _Attempts(url, patience)
    while True:
        pause(0)
        try:
            return ask()
        except CancelledError:
            raise
        except Exception as error:
            attempts.failed(error)


def state(url: str, patience: Patience) -> FileState:
    """Ask a source what the file is; raises as `pieces` does."""
    source = source_of(url, patience.timeout_seconds)

    def ask() -> Iterator[FileState]:
        yield source.state()

    return retried(url, lambda: next(interruptible(ask(), patience.timeout_seconds)), patience)


def pieces(
    url: str,
    patience: Patience,
    *,
    start: int = 0,
    known: FileState | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of a file until it has been yielded to its end.

    Offsets go on where the last piece ended; or back to 0, where a source cannot continue: what was yielded before is
    void then.

    Args:
        url: The file.
        patience: With its source.
        start: Bytes that are there already.
        known: What the file must be. Where size or version are not known, what the source says first.

    Raises:
        FileNotFoundError, PermissionError: At once, for what does not exist or may not be read.
        ChangedError: The file is not `known`, or no longer what was begun.
        FetchError: Another failure, and no more patience.
    """
    source: Source = source_of(url, patience.timeout_seconds)
    attempts = _Attempts(url, patience)
    known = known or FileState()
    position = farthest = start
    num_changed = 0
    while known.size is None or position < known.size:
        pause(0)
        try:
            items = interruptible(_streamed(source, position, known), patience.timeout_seconds)
            found, _, _ = next(items)
            known = FileState(found.size if known.size is None else known.size, known.version or found.version)
            for _, offset, piece in items:
                yield offset, piece
                pause(0)
                position = offset + len(piece)
                if known.size is not None and position > known.size:
                    position = farthest = 0  # what came is not the file's
                    raise ChangedError(f"it has more than {known.size} bytes")
                if position > farthest:
                    farthest, num_changed = position, 0
                    attempts.progress()
            if known.size is not None and position < known.size:
                raise ConnectionError(f"it ended after {position} of {known.size} bytes")
            return
        except CancelledError:
            raise
        except ChangedError as error:
            num_changed += 1
            if num_changed < _SURE:
                attempts.failed(error)  # a proxy's page or a wrong header may look like another file, once
                continue
            raise ChangedError(
                f"{redact(url)} changed while it was read, or since it was listed: {redact(str(error))}"
            ) from None
        except Exception as error:
            attempts.failed(error)


def _streamed(source: Source, start: int, known: FileState) -> Iterator[tuple[FileState, int, bytes]]:
    """What the file is, with an empty piece, and then its pieces."""
    found, stream = source.stream(start, known)
    yield found, start, b""
    for offset, piece in stream:
        yield found, offset, piece


def read_bytes(url: str, patience: Patience, *, limit: int = 1 << 28) -> bytes:
    """A small file as a whole; raises as `pieces` does, and FetchError for one of more than `limit` bytes."""
    content = bytearray()
    for offset, piece in pieces(url, patience):
        del content[offset:]
        content += piece
        if len(content) > limit:
            raise FetchError(f"{redact(url)} has more than {limit} bytes, too many for what it should hold")
    return bytes(content)
