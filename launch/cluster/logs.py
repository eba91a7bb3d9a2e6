"""What the ranks of a run have said, of whom one wants to know (imports no torch)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from launch.run_facts import RunFacts, find_runs, read_facts
from pretrain.survival.failures import ERRORS
from pretrain.survival.rank_log import FOLDER as RANK_LOGS
from pretrain.tracking.log_file import LOG


def lines_of(place: Path, rank: int | None = None, first_error: bool = False, last: int = 40) -> Iterator[str]:
    """The `last` lines of a run's log, or of one rank's; or what the first rank said that failed in its last failure.

    Raises FileNotFoundError where there is no such log, naming those that there are, and ValueError for a folder of
    several runs.
    """
    runs = find_runs([place])
    if len(runs) != 1:
        raise ValueError(f"{place} holds {len(runs)} runs; name one of them, as in {place}/NAME")
    run = read_facts(runs[0])
    if first_error:
        yield from _first_error(run)
        return
    path = _log(run) if not rank else _log_of_rank(run, rank)
    yield f"{path}:"
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line.rstrip("\n") for line in deque(file, maxlen=last))


def _first_error(run: RunFacts) -> Iterator[str]:
    path = run.folder / ERRORS
    if not path.is_file():
        yield f"no rank of {run.folder} has failed in a job so far; what it printed: selfsight logs {run.folder}"
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    section = text[text.rfind("\n=== ") + 1 :]
    head, *failures = section.split("\n--- ")
    yield from head.splitlines()
    yield from (f"--- {failures[0]}" if failures else "no rank left a word of its own").splitlines()
    if len(failures) > 1:
        yield f"--- {len(failures) - 1} more in {path}"


def _log(run: RunFacts) -> Path:
    for path in (*([Path(run.log)] if run.log else []), run.folder / LOG):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{run.folder} has no log yet: its job has not started")


def _log_of_rank(run: RunFacts, rank: int) -> Path:
    found = list((run.folder / RANK_LOGS).glob(f"*/rank-{rank:05d}.log"))
    if found:
        return max(found, key=lambda path: path.stat().st_mtime)
    there = sorted({int(path.stem[5:]) for path in (run.folder / RANK_LOGS).glob("*/rank-*.log")})
    known = f"ranks with a log are {there[0]} .. {there[-1]}" if there else "all of its ranks write to the job's log"
    raise FileNotFoundError(f"rank {rank} of {run.folder} has no log of its own; {known}")
