"""Where every rank is: a small file each, written every few seconds, read when one of them hangs (imports no torch)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

FOLDER = "heartbeats"
READINGS = 10  # of a file that is empty, or half written
#: Code in which a rank waits for the others: the collectives themselves, and the place where results of those that a
#: GPU runs on its own are first looked at.
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "pretrain/engines/collectives.py")


@dataclass(frozen=True)
class Beat:
    """One rank's sign of life."""

    rank: int
    host: str
    step: int  # which it is in, counted from 1; 0 before the first
    phase: str  # what it does there
    seconds: float  # since that began
    at: str  # where the main thread's Python code is
    collective: bool  # it waits for other ranks
    left: float  # seconds that it may still take for what is no part of a step; 0 within one
    count: int  # of its beats: one that no longer rises tells of a process that stands still, whatever the clocks say


class Heartbeat:
    """This rank's file in a run's folder, there from the first beat to `close`. A disk that fails is no trouble."""

    def __init__(self, run: Path, rank: int) -> None:
        self._file = run / FOLDER / f"rank-{rank:05d}.json"
        self._rank, self._count = rank, 0
        self._host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    def beat(self, step: int, phase: str, seconds: float, left: float, frame: FrameType | None) -> None:
        """Write down where this rank is; `frame` is the main thread's."""
        self._count += 1
        at, collective = where(frame)
        beat = Beat(self._rank, self._host, step, phase, round(seconds, 1), at, collective, round(left, 1), self._count)
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # not renamed into place: a reader that meets half a line takes it for no news, and reads again
            self._file.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)
            self._file.parent.rmdir()  # by the last one


def where(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost place of a Python stack that is not the interpreter's own, and whether it waits for other ranks."""
    at, collective = "", False
    library = str(Path(os.__file__).parent)
    while frame is not None:
        name = frame.f_code.co_filename
        collective = collective or any(part in name for part in COLLECTIVES)
        if not at and (not name.startswith(library) or "site-packages" in name):
            at = f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return at, collective


def main_frame(ident: int) -> FrameType | None:
    """The present stack of a thread."""
    return sys._current_frames().get(ident)


def read_beats(run: Path) -> dict[int, Beat]:
    """The last beat of every rank that has a file."""
    beats = [_read(path) for path in sorted((run / FOLDER).glob("rank-*.json"))]
    return {beat.rank: beat for beat in beats if beat}


def _read(path: Path) -> Beat | None:
    """A file's beat; one that is being written is read again, for a rank without a beat is taken for silent."""
    for _ in range(READINGS):
        try:
            return Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            time.sleep(0.02)
        except OSError:
            return None
    return None


def whom_all_wait_for(before: Mapping[int, Beat], now: Mapping[int, Beat], world_size: int) -> list[str]:
    """A line for every rank that holds the others up, from two readings with at least two beats between them.

    Those without a sign of life; else those that have come less far than the others; else, in the same step, those
    that are in no collective while others wait in one. Nothing where the beats don't tell.
    """
    still = [rank for rank in range(world_size) if rank not in now or now[rank] == before.get(rank)]
    if 0 < len(still) < world_size:
        return [_silent(rank, now.get(rank)) for rank in still]
    beats = [now[rank] for rank in range(world_size) if rank in now]
    behind = _fewer(beats, [beat for beat in beats if beat.step == min(each.step for each in beats)])
    if not behind:
        behind = _fewer(beats, [beat for beat in beats if not beat.collective])
    others = max((beat.step for beat in beats), default=0)
    return [
        f"rank {beat.rank} on {beat.host} is in `{beat.phase}` of step {beat.step} for {beat.seconds:.0f} s "
        f"({beat.at}); others wait for it in step {others}"
        for beat in behind
    ]


def _fewer(all_of_them: Sequence[Beat], some: list[Beat]) -> list[Beat]:
    return some if len(some) < len(all_of_them) else []


def _silent(rank: int, beat: Beat | None) -> str:
    if beat is None:
        return f"rank {rank} has given no sign of life: not started, or gone"
    return (
        f"rank {rank} on {beat.host} gives no sign of life, last seen in `{beat.phase}` of step {beat.step} "
        f"({beat.at}): stopped, gone, or in code that does not let Python run"
    )
