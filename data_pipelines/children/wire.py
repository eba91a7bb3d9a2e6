"""How a loader and its children talk: lines of JSON over a socket, open files beside them; nothing is executed."""

from __future__ import annotations

import builtins
import errno
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pkgutil import resolve_name
from typing import Any

Message = dict[str, Any]
_RECEIVED = 1 << 16  # bytes at a time
_MOST_FILES = 250  # at a time; Linux passes 253
_LOOK_MILLISECONDS = 500
_FILES_SECONDS = 60.0
_MOST_TOLD = 20_000  # characters of a message


class Channel:
    """One end of the socket; any number of threads may send, one receives."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._lock = threading.Lock()
        self._rest = b""
        self.files: list[int] = []  # descriptors that came, for the receiver to take in their order

    def send(self, message: Message, files: Sequence[int] = ()) -> None:
        """Raises OSError where nobody is at the other end."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            if files:
                data = data[self._send_files(data, files) :]
            self.socket.sendall(data)

    def _send_files(self, data: bytes, files: Sequence[int]) -> int:
        """Send the beginning of `data` and all of the files; its length.

        All processes of a user together may have as many files on their way as one may have open, and those that start
        take a while to receive theirs.
        """
        deadline = time.monotonic() + _FILES_SECONDS
        while True:
            try:
                return socket.send_fds(self.socket, [data], files)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def receive(self, wait: bool = True) -> Iterator[Message]:
        """What has come, at least one message if it may `wait`; raises EOFError where the other end is closed."""
        while True:
            try:
                flags = 0 if wait else socket.MSG_DONTWAIT
                data, files, _, _ = socket.recv_fds(self.socket, _RECEIVED, _MOST_FILES, flags)
            except BlockingIOError:
                return
            except (ConnectionError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    return
                raise EOFError from error
            self.files += files
            if not data:
                raise EOFError
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)
            if lines:
                return

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.files:
            os.close(descriptor)
        self.files.clear()


class Watch:
    """Waits for words on a socket for as long as some process lives.

    That process is seen to end even where others hold its end of the socket: at once by a descriptor of it, and where
    the system has none, within a second by who this process's parent is.

    Args:
        end: The socket.
        process: The process, this one's parent; or a descriptor of it, inherited from there.
    """

    def __init__(self, end: socket.socket, process: int, is_descriptor: bool = False) -> None:
        self._poll, self._parent = select.poll(), os.getppid()
        self._poll.register(end, select.POLLIN)
        self.descriptor: int | None = process if is_descriptor else _opened(process)
        if self.descriptor is not None:
            self._poll.register(self.descriptor, select.POLLIN)

    def wait(self) -> bool:
        """Whether it lives, after a while or once there is something to receive."""
        found = self._poll.poll(None if self.descriptor is not None else _LOOK_MILLISECONDS)
        if self.descriptor is None:
            return os.getppid() == self._parent
        return all(descriptor != self.descriptor for descriptor, _ in found)


def _opened(process: int) -> int | None:
    try:
        return os.pidfd_open(process)
    except (AttributeError, OSError):  # an older system, or an interpreter built for one
        return None


def told(error: BaseException) -> Message:
    """An exception, as `raised` makes it again."""
    kind = type(error)
    return {
        "kind": f"{kind.__module__}:{kind.__qualname__}",
        "errno": getattr(error, "errno", None) if isinstance(error, OSError) else None,
        "strerror": error.strerror if isinstance(error, OSError) else None,
        "filename": str(error.filename) if isinstance(error, OSError) and error.filename is not None else None,
        "text": str(error.args[0] if isinstance(error, KeyError) and error.args else error)[:_MOST_TOLD],
    }


def raised(message: Message) -> Exception:
    """The exception that was told: of the same type where that is Python's own or ours, else RuntimeError."""
    kind = _kind(message["kind"])
    if kind is None:
        return RuntimeError(f"{message['kind'].partition(':')[2]}: {message['text']}")
    if issubclass(kind, OSError) and message["errno"] is not None:
        filename = message["filename"]
        return OSError(message["errno"], message["strerror"], *([] if filename is None else [filename]))
    try:
        error = kind.__new__(kind)  # its words are there already
    except TypeError:  # a group of exceptions is not made without them
        return RuntimeError(f"{kind.__name__}: {message['text']}")
    error.args = (message["text"],)
    return error if message["text"] in str(error) else RuntimeError(f"{kind.__name__}: {message['text']}")


def _kind(name: str) -> type[Exception] | None:
    module, _, name_within = name.partition(":")
    found: Any = None
    if module == "builtins":
        found = getattr(builtins, name_within, None)
    elif module.partition(".")[0] == "data_pipelines":
        try:
            found = resolve_name(name)
        except (ImportError, AttributeError, ValueError):
            return None
    return found if isinstance(found, type) and issubclass(found, Exception) else None
