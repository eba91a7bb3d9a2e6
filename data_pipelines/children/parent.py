"""The children of a loader, seen from it: started, told what to make, heard, and started again when they die."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_pipelines.children.nursery import Nursery, nursery
from data_pipelines.children.state import State
from data_pipelines.children.wire import Channel, Message, raised

_MOST_DEATHS = 4  # of one child in a row, with nothing made in between
_BACK_OFF_SECONDS = 0.2
_MOST_LINES = 1000  # of a log that are known again
_CLOSED = "the loader is closed; make another one to go on"
_log = logging.getLogger(__name__)


class ChildDiedError(RuntimeError):
    """A process that makes batches ended again and again."""


class ChildTraceError(Exception):
    """Where in a child an exception was raised; its text is the traceback."""


Job = tuple[int, int]  # memory and step


@dataclass
class _Child:
    """One process."""

    share: range  # places among the rank's rows
    fetches: bool  # ahead, for all of them
    nursery: Nursery | None = None
    number: int = 0  # by which the nursery knows it
    pid: int | None = None  # once it has said so
    channel: Channel | None = None
    deaths: int = 0  # since it last made anything
    lost: ChildDiedError | None = None  # where it is not started again
    jobs: dict[Job, Message] = field(default_factory=dict)  # that it has been told of and not done
    fetched: list[float] = field(default_factory=list)  # by this process
    earlier: list[float] = field(default_factory=list)  # by those before it


class Children:
    """Processes that make a rank's rows of any step, each a share of them.

    They are told what to make by `make`, and heard in `listen`, in the caller's thread: there is none in between. A
    child that dies is started again and told of the same jobs; it makes the same bytes.

    Args:
        state: What they are told of the loader; closed along with them.
        rows: Positions in the global batch of the rank.
        count: Processes.
        multiple: Shares are multiples of so many rows.
        hear: Called with what a child tells of bad samples.
        fetches: Whether the first child fetches shards ahead of the steps that read them.
        horizon: Steps that it looks ahead.
    """

    def __init__(
        self,
        state: State,
        rows: range,
        count: int,
        *,
        multiple: int = 1,
        hear: Callable[[Message], None],
        fetches: bool = False,
        horizon: int = 0,
    ) -> None:
        self._state, self._rows, self._hear, self._fetches, self._horizon = state, rows, hear, fetches, horizon
        self._memories: dict[int, tuple[int, int]] = {}  # the descriptor of each, and the step that is consumed next
        self._left: dict[Job, int] = {}  # children that have not made their share
        self._failures: dict[Job, Exception] = {}  # to be raised where the step is asked for
        self._failure: Exception | None = None  # of no step
        self._logged: set[tuple[str, str]] = set()
        self._poll = select.poll()
        self._number = 0
        shares = _shares(len(rows), count, multiple)
        self._children = [_Child(share, fetches and share is shares[0]) for share in shares]
        for child in self._children:
            self._start(child)

    @property
    def count(self) -> int:
        """Processes there are: fewer than were asked for where there are fewer rows."""
        return len(self._children)

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [child.pid for child in self._children if child.pid is not None]

    def open(self, descriptor: int, step: int) -> int:
        """Share memory, a file, with the children; its number, for an iterator that begins with `step`."""
        if not self._state.files:
            raise RuntimeError(_CLOSED)
        for child in self._children:
            child.deaths, child.lost = 0, None
            if child.channel is None:  # lost in an earlier iterator, or another could not be started
                self._start(child)
        self._number += 1
        self._memories[self._number] = (os.dup(descriptor), step)
        for child in self._children:
            self._tell(child, self._memory(self._number, child), self._memories[self._number][0])
        return self._number

    def make(self, memory: int, buffer: int, step: int) -> None:
        """Have a step made in buffer number `buffer` of a memory."""
        if memory not in self._memories:
            raise RuntimeError(_CLOSED)
        job = (memory, step)
        self._left[job] = len(self._children)
        for child in self._children:
            child.jobs[job] = {"make": [memory, buffer, step]}
            self._tell(child, child.jobs[job])
            if child.lost is not None:
                self._failures.setdefault(job, child.lost)

    def is_made(self, memory: int, step: int) -> bool:
        """Whether a step is there, or an error in its place."""
        self.listen(0)
        return self._is_over((memory, step))

    def wait(self, memory: int, step: int) -> None:
        """Return once a step is there; raises what went wrong with it, or with the children."""
        self.listen(0)
        while not self._is_over((memory, step)):
            self.listen(None)
        failure = self._failures.pop((memory, step), None) or self._failure
        if failure is not None:
            self._failure = None
            raise failure

    def _is_over(self, job: Job) -> bool:
        return self._failure is not None or job in self._failures or job not in self._left

    def advance(self, memory: int) -> None:
        """The consumer has done a step."""
        if memory not in self._memories:
            return
        descriptor, step = self._memories[memory]
        self._memories[memory] = descriptor, step + 1
        if self._fetches:
            self._tell(self._children[0], {"advance": memory})

    def forget(self, memory: int) -> None:
        """Give up what is still to be made in a memory."""
        if memory not in self._memories:
            return
        os.close(self._memories.pop(memory)[0])
        self._failures.clear()
        self._failure = None
        self._left = {job: left for job, left in self._left.items() if job[0] != memory}
        for child in self._children:
            child.jobs = {job: message for job, message in child.jobs.items() if job[0] != memory}
            self._tell(child, {"forget": memory})

    def fetched(self) -> list[list[float]]:
        """See `child.fetched`: of each process there is and was."""
        return [total for child in self._children for total in (child.fetched, child.earlier) if total]

    def listen(self, seconds: float | None) -> None:
        """Take in what the children tell, waiting so long for the first word; None: for as long as it takes."""
        try:
            for descriptor, _ in self._poll.poll(None if seconds is None else 1000 * seconds):
                child = next(c for c in self._children if c.channel and c.channel.socket.fileno() == descriptor)
                assert child.channel is not None
                try:
                    for message in child.channel.receive(wait=False):
                        self._take(child, message)
                except EOFError:
                    self._died(child)
        except Exception as error:  # raised by `wait`
            self._failure = self._failure or error

    def close(self) -> None:
        """End the children."""
        for child in self._children:
            self._end(child)
        for descriptor, _ in self._memories.values():
            os.close(descriptor)
        self._memories.clear()
        self._state.close()

    def _take(self, child: _Child, message: Message) -> None:
        if "made" in message:
            self._made(child, message)
        elif "failed" in message:
            error = raised(message["error"])
            error.__cause__ = ChildTraceError("\n" + message["trace"])
            self._fails(message["failed"], error)
        elif "log" in message:
            line = (message["log"], message["text"])
            if line not in self._logged:  # several may find the same
                if len(self._logged) < _MOST_LINES:
                    self._logged.add(line)
                logging.getLogger(message["log"]).log(message["level"], "%s", message["text"])
        elif "ready" in message:
            child.pid = message["ready"]
        else:
            try:
                self._hear(message)
            except Exception as error:
                self._fails(message.get("job"), error)

    def _fails(self, job: list[int] | None, error: Exception) -> None:
        if job is None:
            raise error
        if (job[0], job[1]) in self._left:  # else nobody waits for it any more
            self._failures.setdefault((job[0], job[1]), error)

    def _made(self, child: _Child, message: Message) -> None:
        memory, step = message["made"]
        self._hear(message)
        child.deaths, child.fetched = 0, message["fetched"]
        if child.jobs.pop((memory, step), None) is not None:
            self._left[memory, step] -= 1
            if not self._left[memory, step]:
                del self._left[memory, step]

    def _died(self, child: _Child) -> None:
        """Start a child again that has ended by itself, and tell it again of what it had not done."""
        code, child.deaths = self._end(child), child.deaths + 1
        how = _told_of(code)
        steps = sorted(step for _, step in child.jobs)
        at = f" while it made step {steps[0]}" if steps else ""
        if child.deaths >= _MOST_DEATHS:
            child.lost = ChildDiedError(
                f"a process that makes batches has ended {child.deaths} times in a row{at}; the last {how}. "
                "SIGKILL mostly means that memory is out: lower data.workers, data.threads or data.prefetch, or give "
                "the job more of it. With data.workers=0 this process makes the batches itself"
            )
            for job in child.jobs:
                self._failures.setdefault(job, child.lost)
            return
        _log.warning("a process that makes batches %s%s; another takes its place", how, at)
        child.earlier = [a + b for a, b in zip(child.earlier or [0.0] * 4, child.fetched, strict=False)]
        child.fetched = []
        time.sleep(_BACK_OFF_SECONDS * (child.deaths - 1))
        self._start(child)
        for number, (descriptor, _) in self._memories.items():
            self._tell(child, self._memory(number, child), descriptor)
        for message in child.jobs.values():
            self._tell(child, message)

    def _start(self, child: _Child) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            child.nursery = nursery()
            child.number = child.nursery.fork(theirs, self._state.files, self._state.imports)
        child.pid, child.channel = None, Channel(ours)
        self._poll.register(ours, select.POLLIN)
        rows, share = self._rows, child.share
        told = {"rows": [rows.start, rows.stop], "share": [share.start, share.stop], "fetches": child.fetches}
        self._tell(child, told)

    def _memory(self, number: int, child: _Child) -> Message:
        return {"memory": number, "step": self._memories[number][1], "horizon": self._horizon}

    def _tell(self, child: _Child, message: Message, *files: int) -> None:
        """A child that is gone is told again when it is started again, which `listen` sees to."""
        if child.channel is not None:
            with contextlib.suppress(OSError):
                child.channel.send(message, files)

    def _end(self, child: _Child) -> int | None:
        """Have a child end, and say how it did."""
        if child.channel is None or child.nursery is None:
            return None
        self._poll.unregister(child.channel.socket)
        child.channel.close()  # which ends it
        child.channel = None
        return child.nursery.ended(child.number)


def _told_of(code: int | None) -> str:
    """How a child ended, by its exit status."""
    if code is None:
        return "is gone, and so is the process that started it and would know why"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _shares(num_rows: int, count: int, multiple: int) -> Sequence[range]:
    """`num_rows` in at most `count` nearly equal parts, each but the last a multiple of so many."""
    groups = -(-num_rows // multiple)  # a rank's rows need not be whole ones
    count = min(count, groups)
    edges = [min(num_rows, groups * part // count * multiple) for part in range(count + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(edges)]
