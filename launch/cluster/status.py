"""`selfsight status`: runs and their jobs at a glance, from SLURM's queue and the run folders (imports no torch)."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.cluster.queue import FAILED, Job, ended, has_slurm, queued
from launch.run_facts import RunFacts, age, find_runs, overrides_of, read_facts
from pretrain.survival.stopping import EXIT_STOPPED

#: A run that has reported nothing for so many of its usual intervals, and at least so many seconds, has stalled: saving
#: a checkpoint and drawing pictures take their time, too. Before its first row a run imports, indexes and compiles.
STALLED_INTERVALS, STALLED_SECONDS, STARTING_SECONDS = 10.0, 300.0, 1200.0


@dataclass
class RunStatus:
    """A line of the table. Times are in seconds."""

    run: str
    state: str
    why: str = ""
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    seconds_left: float | None = None
    last_row_age: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    restarts: int = 0
    jobs: list[str] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    nodes: str = ""
    overrides: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)  # that began and are not over
    log: str | None = None


def status(places: Sequence[Path]) -> list[RunStatus]:
    """The runs among and in these folders. Raises OSError for a folder that is not there; a SLURM that can't be asked
    leaves the state of its jobs open."""
    runs = [read_facts(folder) for folder in find_runs(places)]
    given = overrides_of([*places, *(run.folder.parent for run in runs)])
    there: list[Job] | None
    try:
        there, gone = _jobs_of(runs)
    except OSError as error:
        there, gone = None, {}
        print(f"the queue is not known: {' '.join(str(error).split())}", file=sys.stderr)
    return [judge(run, there, gone, given.get(run.folder, [])) for run in runs]


def judge(run: RunFacts, there: Iterable[Job] | None, gone: dict[str, str], overrides: list[str]) -> RunStatus:
    """What a run is doing, from its folder, the jobs `there` are (None: not known), and the last states of those that
    are `gone`."""
    jobs = list(there or ())
    mine = [job for job in jobs if {job.id, job.number} & set(run.jobs)]
    probing = [job for job in jobs if {job.id, job.number, job.id.partition("_")[0]} & set(run.probes)]
    state, why = _state(run, mine, gone)
    if there is None and state in ("died", "gone", "stopped", "new") and run.jobs:
        state, why = _elsewhere(run) or ("unknown", f"job {run.jobs[-1]}, and the queue is not known")
    row = run.row or {}
    loss = row.get("loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        why = f"{why}; " * bool(why) + f"its loss is {loss}"
    return RunStatus(
        run=str(run.folder),
        state=state,
        why=why,
        step=row.get("step"),
        total_steps=run.total_steps,
        loss=_number(loss),
        images_per_second=_number(row.get("images_per_second")),
        data_wait=_number(row.get("data_wait")),
        seconds_left=run.seconds_left() if state in ("running", "stalled", "stopping") else None,
        last_row_age=age(run.row_time),
        checkpoint_step=run.checkpoint[0] if run.checkpoint else None,
        checkpoint_age=age(run.checkpoint[1]) if run.checkpoint else None,
        restarts=max(0, sum(event["event"] == "started" for event in run.history) - 1),
        jobs=[f"{job.id} {job.state}" for job in mine],
        probes=[f"{job.id} {job.state}" for job in probing],
        nodes=next((job.nodes for job in mine if not job.waits), ""),
        overrides=overrides,
        alarms=run.alarms(),
        log=run.log,
    )


def table(runs: Sequence[RunStatus], width: int | None = None) -> str:
    """The runs as text, a line each, and below them why some stand still and where the logs are."""
    from rich.console import Console
    from rich.table import Table

    if not runs:
        return "no runs here"
    names = [Path(run.run).name for run in runs]
    short = len(set(names)) == len(names)
    sheet = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in _COLUMNS:
        sheet.add_column(title, justify=justify, no_wrap=True)
    for run, name in zip(runs, names, strict=True):
        sheet.add_row(name if short else run.run, *_cells(run))
    console = Console(width=width or (None if sys.stdout.isatty() else 200), highlight=False, markup=False)
    with console.capture() as capture:
        console.print(sheet)
    notes = []
    for run, name in zip(runs, names, strict=True):
        told = [
            run.why,
            *(f"ALARM {alarm}" for alarm in run.alarms),
            "; ".join(f"probe {probe}" for probe in run.probes),
            " ".join(run.overrides),
        ]
        if run.log and run.state not in ("finished", "cancelled"):
            told.append(f"log {run.log}")
        if text := "; ".join(part for part in told if part):
            notes.append(f"{name if short else run.run}: {text}")
    body = "\n".join(line.rstrip() for line in capture.get().splitlines())
    return "\n".join([body, *([""] if notes else []), *notes])


def show(places: Sequence[Path], as_json: bool = False, watch: float | None = None) -> None:
    """Print the table, or JSON; again and again where `watch` is given, until Ctrl-C."""
    while True:
        runs = status(places)
        if as_json:
            text = json.dumps([asdict(run) for run in runs], indent=None if watch else 2)
        else:
            text = table(runs)
            if watch:
                text = f"{datetime.now():%Y-%m-%d %H:%M:%S}, every {watch:g} s; Ctrl-C ends\n\n{text}"
            if watch and sys.stdout.isatty():
                text = f"\x1b[H\x1b[2J{text}"
        print(text, flush=True)
        if watch is None:
            return
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            return


def _jobs_of(runs: Sequence[RunFacts]) -> tuple[list[Job], dict[str, str]]:
    """One question for all: the jobs that are there, and how the last ones of unfinished runs ended."""
    open_runs = [run for run in runs if not is_finished(run)]
    asked = [job for run in runs for job in (*(run.jobs[-2:] if run in open_runs else ()), *run.probes)]
    if not asked or not has_slurm():
        if any(run.jobs for run in open_runs):
            raise FileNotFoundError("there is no SLURM on this machine")
        return [], {}
    there = queued(asked)
    known = {name for job in there for name in (job.id, job.number)}
    silent = [run.jobs[-1] for run in open_runs if run.jobs and not known & set(run.jobs) and not _explained(run)]
    return there, ended(silent)


def is_finished(run: RunFacts) -> bool:
    """Whether the run has published what it is for, as of its last step."""
    last = run.last("started", "ended")
    said = last is not None and last["event"] == "ended" and last.get("code") == 0
    return said or (run.published is not None and run.total_steps is not None and run.published >= run.total_steps)


def _explained(run: RunFacts) -> bool:
    last = run.last("submitted", "started", "ended", "given_up")
    return last is not None and last["event"] in ("ended", "given_up")


def _state(run: RunFacts, jobs: Sequence[Job], gone: dict[str, str]) -> tuple[str, str]:
    running = [job for job in jobs if not job.waits]
    if running:
        job = running[0]
        if run.cancelled is not None:
            return "stopping", f"cancelled by {run.cancelled.get('by')}; it writes a checkpoint"
        return _running(run, job.elapsed)
    if jobs:
        job = jobs[0]
        back = run.last("started", "requeued") is not None
        expected = f", expected to start {job.start.replace('T', ' ')}" if job.start else ""
        return ("requeued" if back else "queued"), f"{job.id} waits: {job.reason or 'unknown reason'}{expected}"
    if run.held:
        assert run.holder is not None
        return _running(run, None, f"by process {run.holder.get('pid')} of this machine")
    if is_finished(run):
        return "finished", ""
    if run.cancelled is not None:
        return "cancelled", f"by {run.cancelled.get('by')}"
    return _over(run, gone)


def _running(run: RunFacts, elapsed: float | None, where: str = "") -> tuple[str, str]:
    row_age, steps = age(run.row_time), (run.config.get("tracking") or {}).get("log_every_steps", 10)
    new = row_age is None or (elapsed is not None and row_age > elapsed)
    if new:  # no row of this start yet
        if elapsed is not None and elapsed > STARTING_SECONDS:
            return "stalled", f"has run for {span(elapsed)} without a step"
        return "starting", where
    assert row_age is not None
    speed, batch = (run.row or {}).get("images_per_second"), (run.config.get("train") or {}).get("batch_size")
    usual = steps * batch / speed if speed and batch else 0.0
    if row_age > max(STALLED_SECONDS, STALLED_INTERVALS * usual):
        return "stalled", f"has reported nothing for {span(row_age)}"
    return "running", where


def _over(run: RunFacts, gone: dict[str, str]) -> tuple[str, str]:
    """A run without a job or a process, that is not finished."""
    last = run.last("submitted", "started", "ended", "given_up")
    job = next((gone[name] for name in reversed(run.jobs) if name in gone), "")
    if last is None:
        return _elsewhere(run) or (("stopped", "") if run.row else ("new", ""))
    if last["event"] == "given_up":
        reason = str(last.get("reason", ""))
        return ("cancelled" if reason.startswith("cancelled by") else "failed"), reason
    if last["event"] == "ended":
        reason = str(last.get("reason", ""))
        return ("stopped" if last.get("code") == EXIT_STOPPED else "failed"), reason
    if job.startswith("CANCELLED"):
        return "cancelled", f"job {run.jobs[-1]} was taken out of the queue"
    if last["event"] == "submitted":
        what = f"ended as {job}" if job else "is no longer in the queue"
        return "failed" if job.startswith(FAILED) else "gone", f"job {run.jobs[-1] if run.jobs else '?'} {what}"
    if run.holder is not None and not run.holder.get("job") and (there := _elsewhere(run)):
        return there
    return "died", f"job {run.jobs[-1]} ended as {job}" if job and run.jobs else "ended without a word"


def _elsewhere(run: RunFacts) -> tuple[str, str] | None:
    """A run that another machine holds, and that has reported something of late."""
    row_age = age(run.row_time)
    if run.held is None and run.holder is not None and row_age is not None and row_age < STALLED_SECONDS:
        return "running", f"on {run.holder.get('host')}"
    return None


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("run", "left"),
    ("state", "left"),
    ("step", "right"),
    ("loss", "right"),
    ("img/s", "right"),
    ("data", "right"),
    ("eta", "right"),
    ("checkpoint", "right"),
    ("restarts", "right"),
    ("job", "left"),
    ("nodes", "left"),
)


def _cells(run: RunStatus) -> list[str]:
    step = "" if run.step is None else str(run.step) + ("" if run.total_steps is None else f"/{run.total_steps}")
    saved = "" if run.checkpoint_step is None else f"{run.checkpoint_step}, {span(run.checkpoint_age or 0)} ago"
    moving = run.state in ("running", "stalled", "stopping")
    return [
        run.state,
        step,
        "" if run.loss is None else f"{run.loss:.4g}",
        "" if run.images_per_second is None or not moving else f"{run.images_per_second:.0f}",
        "" if run.data_wait is None or not moving else f"{run.data_wait:.0%}",
        "" if run.seconds_left is None else span(run.seconds_left),
        saved,
        str(run.restarts) if run.restarts else "",
        ", ".join(job.partition(" ")[0] for job in run.jobs),
        run.nodes,
    ]


def span(seconds: float) -> str:
    """`45 s`, `12 min`, `3:20 h`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _number(value: Any) -> float | None:
    """A finite number; what is not is None, for JSON has no word for it."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
