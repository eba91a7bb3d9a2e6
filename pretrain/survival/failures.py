"""Which rank failed first, and of what: a small file of each that fails, read when the job's step is over (imports no
torch)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.survival.heartbeat import FOLDER as HEARTBEATS
from pretrain.survival.heartbeat import read_beats
from pretrain.survival.stopping import EXIT_STOPPED, exit_code

FOLDER = "failures"
ERRORS = "errors.log"  # of all ranks and starts
MOST_BYTES = 2**20  # of that file; then it becomes errors.log.1
MOST_TOLD = 8  # failures of one start whose traceback is kept there
ATTEMPT = "SELFSIGHT_ATTEMPT"  # how often the batch script has started training in this stay, from 0
_LONGEST = 4000  # characters of a traceback
#: What a rank says that lost the others: it failed because another one had.
_OF_OTHERS = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|timed out waiting|remote process exited"
    r"|unhandled system error|ncclRemoteError|socket closed",
    re.IGNORECASE,
)
_DISTRIBUTED = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}


@dataclass(frozen=True)
class Failure:
    """How one rank ended."""

    rank: int
    host: str
    time: float  # seconds since 1970, by this host's clock
    code: int
    step: int
    error: str  # one line
    followed: bool  # it says itself that it lost another rank
    text: str  # the end of its traceback

    def told(self) -> str:
        """`rank 3 on n2 in step 8: RuntimeError: ...`"""
        return f"rank {self.rank} on {self.host} after step {self.step}: {self.error}"


def start_of(environ: Mapping[str, str]) -> str | None:
    """The name of one start of training of a SLURM job; None outside of one."""
    job = environ.get("SLURM_JOB_ID")
    return job and f"{job}-{environ.get('SLURM_RESTART_COUNT') or 0}-{environ.get(ATTEMPT) or 0}"


@contextmanager
def noted(run: Path, rank: int, about: Mapping[str, Any]) -> Iterator[None]:
    """What fails inside leaves this rank's note in the run's folder; `about` has the `step`, and the `reason` where the
    run knows it. Outside of SLURM, whose batch script reads them, there are no notes."""
    start = start_of(os.environ)
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        if start is not None and code not in (0, EXIT_STOPPED):
            with contextlib.suppress(OSError):
                _write(run / FOLDER / start, _failure(error, rank, code, about))
        raise


def read_failures(run: Path, start: str) -> list[Failure]:
    """The notes of one start, the first to fail in front: those who lost another rank come after the others."""
    found = []
    for path in (run / FOLDER / start).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda failure: (failure.followed, failure.time, failure.rank))


def first_to_fail(run: Path, start: str) -> str:
    """In a line, whom the others fell with; empty where nothing tells.

    Ranks that have left a sign of life and no word were killed, or their node was lost: they come first.
    """
    notes = read_failures(run, start)
    spoken = {failure.rank for failure in notes}
    silent = [beat for rank, beat in sorted(read_beats(run).items()) if rank not in spoken]
    if silent and (notes or len(silent) == 1):
        named = "; ".join(
            f"rank {beat.rank} on {beat.host}, last seen in `{beat.phase}` of step {beat.step}" for beat in silent[:4]
        )
        more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
        return f"killed without a word: {named}{more}"
    if notes and not notes[0].followed:
        return f"first to fail: {notes[0].told()}"
    return f"no rank says more than that it lost another one: {notes[0].told()}" if notes else ""


def gather_errors(run: Path, start: str, reason: str) -> None:
    """Add what the ranks of one start said to the run's `errors.log`, the first to fail in front. A full file is turned
    over to `errors.log.1`."""
    notes = read_failures(run, start)
    parts = [f"=== {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} start {start}: {reason}"]
    for failure in notes[:MOST_TOLD]:
        parts.append(f"--- {failure.told()} (exit code {failure.code})\n{failure.text.rstrip()}")
    if len(notes) > MOST_TOLD:
        parts.append(f"--- and {len(notes) - MOST_TOLD} more in {FOLDER}/{start}/")
    path = run / ERRORS
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            path.replace(path.with_name(f"{ERRORS}.1"))
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(parts) + "\n")


def forget_signs_of_life(run: Path) -> None:
    """Take away the heartbeats of ranks that are gone: of the next start, they would tell wrongly."""
    shutil.rmtree(run / HEARTBEATS, ignore_errors=True)


def _failure(error: BaseException, rank: int, code: int, about: Mapping[str, Any]) -> Failure:
    line = " ".join(str(about.get("reason") or f"{type(error).__name__}: {error}").split())[:500]
    names = {each.__name__ for each in type(error).__mro__}
    followed = bool(
        names & _DISTRIBUTED or (isinstance(error, RuntimeError | OSError) and _OF_OTHERS.search(str(error)))
    )
    text = "".join(traceback.format_exception(error))[-_LONGEST:]
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Failure(rank, host, time.time(), code, int(about.get("step") or 0), line, followed, text)


def _write(folder: Path, failure: Failure) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{failure.rank:05d}.json").write_text(json.dumps(asdict(failure)) + "\n", encoding="utf-8")
