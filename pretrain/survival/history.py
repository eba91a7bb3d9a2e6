"""What became of a run, job by job: `runs/NAME/history.jsonl`, one event a line, only ever added to (imports no torch).

Every event has `time` (ISO 8601, UTC), `event`, `job` and `restart` (SLURM's, or None) and `host`; what else it says
depends on the event:

    submitted   jobs, command, log         the jobs queued for the run, by `selfsight submit`
    started     step, command, preset, ranks, nodes, zero_stage, versions, seconds
                                           after the first step: what took how long, and the preset that was chosen
    saved_not   step, reason               a checkpoint that could not be written
    alarm       step, name, text, begins   trouble with training, as diagnostics names it; begins: false when it is over
    ended       step, code, reason         by the run itself: finished, stopped, hung, trouble, an error
    preflight   sick, text                 nodes that failed their checks before a start
    restarted   code, reason               by the batch script: training starts again in the same job
    requeued    code, reason               the job goes back into the queue
    given_up    code, reason               or does not
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.survival.stopping import EXIT_STOPPED, EXIT_USER_ERROR, exit_code

FILE = "history.jsonl"
EVENTS = ("submitted", "started", "saved_not", "alarm", "ended", "preflight", "restarted", "requeued", "given_up")


def record(run: Path, event: str, **details: Any) -> dict[str, Any]:
    """Add an event to a run's history and return it; the folder is made if it is not there yet.

    Raises ValueError for an event that has no name here. A line is one write of its own, so that jobs of several nodes
    may add to it.
    """
    if event not in EVENTS:
        raise ValueError(f"there is no event {event!r}; events: {', '.join(EVENTS)}")
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "event": event,
        "job": job,
        "restart": None if job is None else int(restart or 0),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        **details,
    }
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        begun = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a line that a full disk cut
        os.write(descriptor, (begun * "\n" + json.dumps(row) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return row


def try_record(run: Path, event: str, **details: Any) -> None:
    """As `record`, but a disk that is full or away costs the event only, with a line that says so."""
    try:
        record(run, event, **details)
    except OSError as error:
        print(f"{run / FILE}: {event!r} could not be recorded: {error}", file=sys.stderr, flush=True)


@contextmanager
def recorded_end(run: Path, about: dict[str, Any]) -> Iterator[None]:
    """Record how what is inside ends, whichever way it does; `about` may be added to until then (step, reason).

    A start of a begun run that is refused before its first step (other data, another configuration) says nothing of
    the run, and is not recorded.
    """
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        if (
            code == EXIT_USER_ERROR
            and not about.get("step")
            and any(e["event"] == "started" for e in read_history(run))
        ):
            raise
        reason = "stopped as asked" if code == EXIT_STOPPED else f"{type(error).__name__}: {error}"
        try_record(run, "ended", **{"reason": reason, **about, "code": code})
        raise
    try_record(run, "ended", **{"reason": "finished", **about, "code": 0})


def read_history(run: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; none where nothing was written. A line cut by a full disk is left out."""
    try:
        lines = (run / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "event" in row:
            events.append(row)
    return events


def standing_alarms(history: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Alarms that have begun and are not over, by name. A run that comes back has those that stood at the step it goes
    on from."""
    standing: dict[str, Mapping[str, Any]] = {}
    for event in last_told(history):
        if event["event"] == "alarm" and event.get("begins", True):
            standing.setdefault(str(event.get("name")), event)
        elif event["event"] == "alarm":
            standing.pop(str(event.get("name")), None)
    return standing


def last_told(history: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The history without alarms, begun or over, of steps that a later start did again: what there was of them is told
    again."""
    kept: list[Mapping[str, Any]] = []
    for event in history:
        if event["event"] == "started":
            kept = [each for each in kept if each["event"] != "alarm" or not is_later(each, event)]
        kept.append(event)
    return kept


def is_later(event: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Whether an event is of a step that a later `start` does again."""
    steps = event.get("step"), start.get("step")
    return all(isinstance(step, int) for step in steps) and steps[0] > steps[1]
