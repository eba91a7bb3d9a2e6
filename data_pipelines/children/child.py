"""A child of a loader: makes its rows of the steps that it is told of, and ends with its parent.

It has NumPy and this package, and no torch; it is forked by `nursery`, with its end of a socket and the `State` of the
loader.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import mmap
import os
import socket
import threading
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from data_pipelines.children.state import maker_of
from data_pipelines.children.wire import Channel, Message, Watch, told
from data_pipelines.datasets.account import BadSampleAccount
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.datasets.prefetch import ShardPrefetcher
from data_pipelines.images.decode import BadSampleError
from data_pipelines.layout import Layout
from data_pipelines.rows import RowMaker, fetched

_thread = threading.local()  # `job`: the memory and the step that the thread is at


class _Told(BadSampleAccount):
    """Tells the parent, who keeps the account of all its children."""

    def __init__(self, key: int, dataset: Dataset, channel: Channel) -> None:
        super().__init__(dataset.num_samples, 1.0)
        self._key, self._dataset, self._channel = key, dataset, channel
        self._untold = 0  # good reads

    def count_good(self, count: int = 1) -> None:
        with self._lock:
            self._untold += count

    def count_bad(self, error: BadSampleError) -> None:
        """Counted where it is named."""

    def note(self, cases: Any, where: str) -> None:
        with self._lock:
            new = [case for case in cases if case not in self._noted]
            self._noted.update(new)
        if new:
            self._channel.send({"note": self._key, "cases": new, "where": where})

    def name(self, number: int, error: BadSampleError, instead: str | None) -> None:
        reason = {"key": error.key, "reason": error.reason, "case": error.case}
        bad = {"bad": self._key, "number": number, "instead": instead, "job": _thread.job}
        self._channel.send(bad | reason)

    def take(self) -> int:
        """Good reads that were not told yet."""
        with self._lock:
            count, self._untold = self._untold, 0
        return count


class _Forward(logging.Handler):
    """Has the parent log what is logged here."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # its words and values don't go together, which ends nobody elsewhere
            text = f"{record.msg} {record.args}"
        with contextlib.suppress(OSError):  # the parent is gone, and so are we
            self._channel.send({"log": record.name, "level": record.levelno, "text": text})


@dataclass
class _Memory:
    """That of one iterator over steps."""

    mapped: mmap.mmap
    layout: Layout
    stop: threading.Event
    prefetcher: ShardPrefetcher | None


class Child:
    """Answers the messages of a loader, see `parent.Children`."""

    def __init__(self, channel: Channel, files: list[int]) -> None:
        self._channel = channel
        self._accounts: dict[int, _Told] = {}
        self._maker: RowMaker = maker_of(files, self._account)
        self._fields = self._maker.fields()
        self._memories: dict[int, _Memory] = {}
        self._rows = self._share = range(0)  # of the rank; of this child, places among those
        self._fetches = False  # ahead of the steps that read it

    def answer(self, message: Message) -> None:
        """Do what a message asks for, or begin to."""
        if "share" in message:
            self._rows, self._share = range(*message["rows"]), range(*message["share"])
            self._fetches = message["fetches"]
        elif "memory" in message:
            self._open(message, self._channel.files.pop(0))
        elif "make" in message:
            self._make(*message["make"])
        elif "advance" in message:
            memory = self._memories.get(message["advance"])
            if memory is not None and memory.prefetcher is not None:
                memory.prefetcher.advance()
        elif "forget" in message:
            memory = self._memories.pop(message["forget"], None)
            if memory is not None:
                memory.stop.set()
                if memory.prefetcher is not None:
                    memory.prefetcher.close()

    def _account(self, key: int, dataset: Dataset) -> _Told:
        self._accounts[key] = _Told(key, dataset, self._channel)
        return self._accounts[key]

    def _open(self, message: Message, descriptor: int) -> None:
        mapped = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        prefetcher = None
        if self._fetches:
            start, datasets = message["step"], self._maker.sampler.datasets.values()
            prefetcher = ShardPrefetcher(datasets, self._maker.needs(start, self._rows), message["horizon"], start)
        layout = Layout(self._fields, len(self._rows))
        self._memories[message["memory"]] = _Memory(mapped, layout, threading.Event(), prefetcher)

    def _make(self, number: int, buffer: int, step: int) -> None:
        memory = self._memories[number]
        arrays = memory.layout.arrays(memory.mapped, buffer)
        first = self._rows.start + self._share.start
        rows = range(first, first + len(self._share))

        def note() -> None:
            _thread.job = [number, step]

        pieces = self._maker.begin(arrays, step, rows, self._share.start, stop=memory.stop, wait=note)
        left = len(pieces)
        lock = threading.Lock()

        def ended(piece: Future[None]) -> None:
            nonlocal left
            error = piece.exception()
            with lock:
                left -= 1
                is_last = left == 0
            if memory.stop.is_set():
                return
            if error is not None:
                trace = "".join(traceback.format_exception(error))
                self._channel.send({"failed": [number, step], "error": told(error), "trace": trace})
            if is_last:
                self._channel.send({"made": [number, step], "good": self._good(), "fetched": self._fetched()})

        for piece in pieces:
            piece.add_done_callback(ended)

    def _good(self) -> list[list[int]]:
        return [[key, account.take()] for key, account in self._accounts.items()]

    def _fetched(self) -> list[float]:
        """See `Loader.fetch_metrics`."""
        return fetched(self._maker.sampler.datasets.values())


def main(end: int, files: list[int], parent: int | None) -> None:
    """Answer the loader until it is gone.

    Args:
        end: Of a socket, the other one being the loader's.
        files: Of a `State`.
        parent: A descriptor of the loader's process, where the system has such; else the nursery, which ends with it,
            is looked for.
    """
    faulthandler.enable()
    channel = Channel(socket.socket(fileno=end))
    logging.basicConfig(handlers=[_Forward(channel)], level=logging.WARNING, force=True)
    try:
        child = Child(channel, files)
        channel.send({"ready": os.getpid()})
        watch = Watch(channel.socket, os.getppid() if parent is None else parent, is_descriptor=parent is not None)
        while watch.wait():
            for message in channel.receive(wait=False):
                child.answer(message)
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        trace = traceback.format_exc()
        with contextlib.suppress(OSError):
            channel.send({"failed": None, "error": told(error), "trace": trace})
    finally:
        os._exit(0)  # at once, whatever the threads are at
