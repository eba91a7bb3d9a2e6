"""Where children come from: a fresh interpreter that imports what they need once, and forks itself for each.

A process that trains must not be forked: it has threads, and perhaps a GPU. The nursery has neither. It is started with
the first loader that wants children, serves all those of its process, and ends with it. A child costs it milliseconds,
so one that died is replaced at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from data_pipelines.children.wire import Channel, Message, Watch

#: What is sent to every process of a job is for the parent: it needs its children until it is done.
NOT_FOR_CHILDREN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: One number a process: children share the cores already.
_ENVIRONMENT = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
    "PYDANTIC_DISABLE_PLUGINS": "__all__",  # looking for some takes a tenth of the start
}
_BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\nfrom {module} import main; main({end}, {parent})"
_ENDED_SECONDS = 5.0  # for a process whose socket is closed
_POLL_SECONDS = 0.005


class Nursery:
    """The nursery of this process, seen from it; for any number of threads."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        code = _BEGIN.format(module=__name__, end=theirs.fileno(), parent=os.getpid())
        # blocked until they are ignored, so that none can end it while it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_CHILDREN)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(_path())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=_folder(),
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ENVIRONMENT},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._channel = Channel(ours)
        self._lock = threading.Lock()
        self._number = 0
        self.owner = os.getpid()
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, end: socket.socket, files: Sequence[int], imports: Sequence[str] = ()) -> int:
        """Have a child begin, see `child.main`, and return at once; the number by which the nursery knows it.

        Args:
            end: The child's end of a socket.
            files: Open files for it.
            imports: Modules that the child will ask for.
        """
        with self._lock:
            self._number += 1
            told = {"path": _path(), "cwd": _folder(), "environment": {**os.environ, **_ENVIRONMENT}}
            message = {"fork": self._number, "files": 1 + len(files), "imports": list(imports), **told}
            self._channel.send(message, [end.fileno(), *files])
            return self._number

    def ended(self, number: int) -> int | None:
        """How a child that is about to end has ended, see `waitstatus_to_exitcode`; None: it has not, or who knows."""
        try:
            with self._lock:
                self._channel.send({"ended": number})
                while True:
                    for message in self._channel.receive():
                        if message["ended"] == number:
                            status: int | None = message["status"]
                            return status
        except (OSError, EOFError):
            return None

    def close(self) -> None:
        """End it, and with it nothing else: children end with their loaders."""
        if self.owner == os.getpid():
            self._channel.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDED_SECONDS)


_lock = threading.Lock()
_nursery: Nursery | None = None


def nursery() -> Nursery:
    """That of this process, started if it is not there, so that children come the sooner the earlier this is called."""
    global _nursery
    with _lock:
        if _nursery is None or _nursery.owner != os.getpid() or not _nursery.is_alive:
            _nursery = Nursery()
        return _nursery


def _path() -> list[str]:
    """Where modules are looked for, ours first, wherever this process was started."""
    root, folder = str(Path(__file__).parents[2]), _folder()
    return [root, *(entry for entry in (os.path.normpath(Path(folder, entry)) for entry in sys.path) if entry != root)]


def _folder() -> str:
    """Where this process is; the root where that folder was removed, in which no interpreter would start."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "/"


class _Server:
    """The other end."""

    def __init__(self, channel: Channel, parent: int | None) -> None:
        self._channel, self._parent = channel, parent
        self._pids: dict[int, int] = {}

    def answer(self, message: Message) -> None:
        if "fork" in message:
            self._fork(message)
        else:
            self._channel.send({"ended": message["ended"], "status": self._status(message["ended"])})

    def _fork(self, message: Message) -> None:
        # those of the next message may be there: the system keeps apart only messages that are short (some 48 KB)
        end, *files = self._channel.files[: message["files"]]
        del self._channel.files[: message["files"]]
        sys.path[:] = message["path"]
        for name in message["imports"]:
            with contextlib.suppress(Exception):  # the child meets it, and can tell
                import_module(name)
        pid = os.fork()
        if not pid:
            self._channel.socket.close()
            _become_child(end, files, self._parent, message)
        self._pids[message["fork"]] = pid
        for descriptor in (end, *files):
            os.close(descriptor)

    def _status(self, number: int) -> int | None:
        pid = self._pids.pop(number, None)
        deadline = time.monotonic() + _ENDED_SECONDS
        while pid is not None:
            with contextlib.suppress(ChildProcessError):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return None
            time.sleep(_POLL_SECONDS)
        return None


def _become_child(end: int, files: list[int], parent: int | None, message: dict[str, Any]) -> None:
    from data_pipelines.children import child

    try:
        os.environ.clear()
        os.environ.update(message["environment"])
        with contextlib.suppress(OSError):
            os.chdir(message["cwd"])
        child.main(end, files, parent)
    finally:
        os._exit(1)


def main(end: int, parent: int) -> None:
    """Fork as the parent asks for it, until that is gone."""
    for number in NOT_FOR_CHILDREN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_CHILDREN)
    try:
        channel = Channel(socket.socket(fileno=end))
        watch = Watch(channel.socket, parent)
        import_module("data_pipelines.children.child")
        server = _Server(channel, watch.descriptor)
        while watch.wait():
            for message in channel.receive(wait=False):
                server.answer(message)
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()  # its parent only sees that it is gone
    finally:
        os._exit(0)
