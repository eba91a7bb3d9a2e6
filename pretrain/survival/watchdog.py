"""Ending a rank that hangs, after it has said where: a lost peer can leave a collective waiting for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.survival import killer
from pretrain.survival.heartbeat import Heartbeat, main_frame, read_beats, whom_all_wait_for
from pretrain.survival.history import record
from pretrain.survival.stopping import EXIT_HUNG

if TYPE_CHECKING:
    from pretrain.config.sections import EngineConfig

STACKS = "stacks"
FEW_STEPS = 5  # before so many are known, a step may take as long as anything else


@dataclass(frozen=True)
class Limits:
    """How long what may take, in seconds.

    A step: `factor` times the median of the last ones, at least `floor` and at most `longest`. Whatever else there is
    (the start, checkpoints, pictures, the first steps, which compile): `longest`.
    """

    longest: float = 1800.0
    factor: float = 20.0
    floor: float = 180.0
    grace: float = 12.0  # from the report to the end, in which the other ranks report, too
    tick: float = 1.0  # how often to look
    beat: float = 5.0  # how often to write a sign of life

    @classmethod
    def of(cls, engine: EngineConfig, world_size: int) -> Limits | None:
        """What a configuration says; None where it wants no watchdog. Many ranks give signs of life less often."""
        if engine.hang_seconds is None:
            return None
        beat = max(5.0, world_size / 20)
        return cls(engine.hang_seconds, engine.hang_factor, engine.hang_floor_seconds, grace=2.4 * beat, beat=beat)


@dataclass(frozen=True)
class _Doing:
    """What this rank does, since when (in watched seconds), and until when it may."""

    step: int
    phase: str
    step_since: float
    phase_since: float
    limit: float
    warned_at: float
    allowed: bool = False  # something that is no part of a step


class Watchdog:
    """Ends this process with EXIT_HUNG when what it does takes far longer than it should.

    First it writes every thread's stack to stderr and to `RUN/stacks/`; then, with what all ranks last said, which of
    them the others wait for. A step that is slow but ends in time is only warned of. A process that cannot report any
    more, because it was stopped or because code in C keeps Python's lock, is killed by a process of its own
    (`pretrain.survival.killer`). Time in which the whole process was suspended does not count.

    It watches inside its `with` block; without limits it never barks.

    Args:
        limits: How long what may take; None: never mind.
        run: The run's folder, for stacks and heartbeats; None: stderr only.
        rank, world_size: Which process of how many this is.
        dump: Called with the folder of the stacks when this rank hangs, to leave what else there is to know.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        run: Path | None = None,
        rank: int = 0,
        world_size: int = 1,
        dump: Callable[[Path], None] | None = None,
    ) -> None:
        self._dump = dump
        self.limits, self._run, self._rank, self._world_size = limits, run, rank, world_size
        self._durations: deque[float] = deque(maxlen=101)
        self._lost = 0.0  # seconds in which this process did not run
        self._alive: list[int] = []
        self._main = threading.main_thread().ident or 0
        self._heartbeat = Heartbeat(run, rank) if run and limits else None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        longest = limits.longest if limits else float("inf")
        self._doing = _Doing(0, "start", self._clock(), self._clock(), longest, longest)

    def step(self, number: int) -> None:
        """Step `number`, counted from 1, begins, with waiting for its data."""
        now, before = self._clock(), self._doing
        if before.step:
            self._durations.append(now - before.step_since)
        if self.limits:
            limit = self.step_limit()
            self._doing = _Doing(number, "data", now, now, limit, limit / 3)

    def phase(self, name: str) -> None:
        """Within the step, something else begins; the step's time goes on."""
        before = self._doing
        self._doing = _Doing(before.step, name, before.step_since, self._clock(), before.limit, before.warned_at)

    @contextmanager
    def allowing(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Inside, something goes on that is no part of a step and may take `seconds` (default: the longest)."""
        before, begun = self._doing, self._clock()
        if self.limits:
            limit = self.limits.longest if seconds is None else seconds
            self._doing = _Doing(before.step, name, begun, begun, limit, limit, allowed=True)
        yield
        now = self._clock()  # the step's own time stands still meanwhile
        since = before.step_since + now - begun
        self._doing = _Doing(before.step, before.phase, since, now, before.limit, before.warned_at)

    def step_limit(self) -> float:
        """How long a step may take now."""
        assert self.limits
        if len(self._durations) < FEW_STEPS:
            return self.limits.longest
        return min(self.limits.longest, max(self.limits.floor, self.limits.factor * self._median()))

    def __enter__(self) -> Watchdog:
        if self.limits:
            self._guard = killer.start()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join(timeout=5)
        if self._guard:
            killer.end(self._guard)
        if self._heartbeat:
            self._heartbeat.close()

    def _clock(self) -> float:
        """Seconds, without those in which this process was suspended."""
        return time.monotonic() - self._lost

    def _median(self) -> float:
        return statistics.median(self._durations)

    def _watch(self) -> None:
        assert self.limits
        tick, beaten = self.limits.tick, float("-inf")
        warned, excused, excuses = -1, -1, 0
        while not self._rested(tick):
            doing, clock = self._doing, self._clock()
            taken = clock - doing.step_since
            if clock - beaten >= self.limits.beat:
                beaten = clock
                self._beat(doing)
            if self._guard:
                killer.feed(self._guard, doing.limit + 3 * self.limits.grace + 10 * tick)  # after the others' reports
            if taken > doing.limit and doing is self._doing:
                excuses = excuses + 1 if excused == doing.step else 1
                excused = doing.step
                if excuses * doing.limit < self.limits.longest and self._excused():
                    self._lost += taken  # it starts anew
                elif doing is self._doing:
                    self._end(doing, taken)
            elif taken > doing.warned_at and warned != doing.step and self._rank == 0 and doing is self._doing:
                warned = doing.step
                self._warn(doing, taken)

    def _rested(self, tick: float) -> bool:
        """Wait for a tick; whether the watch is over."""
        began = time.monotonic()
        over = self._over.wait(tick)
        slept = time.monotonic() - began  # a beat that a slow disk keeps is not in it: meanwhile the others go on
        if slept > 10 * tick + 1:  # nobody sleeps that long: we were suspended, with all that goes on here
            self._lost += slept - tick
        return over

    def _beat(self, doing: _Doing) -> None:
        if self._heartbeat:
            seconds = self._clock() - doing.phase_since
            left = max(0.0, doing.limit - seconds) if doing.allowed else 0.0
            self._heartbeat.beat(doing.step, doing.phase, seconds, left, main_frame(self._main))

    def _excused(self) -> bool:
        """Whether a step is late because another rank is busy with what may take longer, such as a checkpoint."""
        if self._run is None or self._world_size == 1 or self._doing.allowed or self.limits is None:
            return False
        before = read_beats(self._run)
        time.sleep(1.2 * self.limits.beat)  # of one that stands still, the last beat is no excuse
        now = read_beats(self._run)
        return any(beat.left > 0 and beat != before.get(rank) for rank, beat in now.items() if rank != self._rank)

    def _warn(self, doing: _Doing, taken: float) -> None:
        what = f"{self._what(doing, taken)}; the job ends when it has taken {doing.limit:.0f} s"
        who = whom_all_wait_for({}, read_beats(self._run), self._world_size) if self._run else []
        print(". ".join([what, *who]), file=sys.stderr, flush=True)

    def _end(self, doing: _Doing, taken: float) -> None:
        """Say where everybody is, and end."""
        what = f"{self._what(doing, taken)}, longer than {doing.limit:.0f} s: it hangs"
        path = self._run / STACKS / f"rank-{self._rank:05d}-step-{doing.step}.txt" if self._run else None
        print(f"{what}\n{f'these stacks are also in {path}' if path else ''}".rstrip(), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if path:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", encoding="utf-8") as file:
                    print(what, f"process {os.getpid()}", file=file, sep="\n", flush=True)
                    faulthandler.dump_traceback(file=file, all_threads=True)
                if self._dump:
                    self._dump(path.parent)
        who = self._whom_all_wait_for(doing)
        if self._doing is not doing:
            print("it goes on after all", file=sys.stderr, flush=True)
            return
        for line in who:
            print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            if path:
                with path.open("a", encoding="utf-8") as file:
                    print("", *who, file=file, sep="\n")
            if self._run and self._rank == min(self._alive, default=self._rank):
                reason = f"hung: {what}" if not who else f"hung: {'; '.join(who)}"
                record(self._run, "ended", step=max(doing.step - 1, 0), code=EXIT_HUNG, reason=reason)
        os._exit(EXIT_HUNG)

    def _whom_all_wait_for(self, doing: _Doing) -> list[str]:
        """Takes a while: two readings of what the ranks say, `grace` apart."""
        assert self.limits
        if not self._run or self._world_size == 1:
            return []
        self._beat(doing)
        before, until = read_beats(self._run), time.monotonic() + self.limits.grace
        while time.monotonic() < until:
            time.sleep(min(self.limits.beat, self.limits.grace) / 4)
            self._beat(doing)
            if self._guard:
                killer.feed(self._guard, self.limits.grace + 10 * self.limits.tick)
        now = read_beats(self._run)
        self._alive = [rank for rank, beat in now.items() if beat != before.get(rank)]
        return whom_all_wait_for(before, now, self._world_size)

    def _what(self, doing: _Doing, taken: float) -> str:
        rank = f"rank {self._rank} of {self._world_size}: " if self._world_size > 1 else ""
        usual = f", the median is {self._median():.2f} s" if self._durations else ""
        phase = self._clock() - doing.phase_since
        return f"{rank}step {doing.step} has taken {taken:.0f} s so far{usual}; in `{doing.phase}` for {phase:.0f} s"
