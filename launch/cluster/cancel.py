"""`selfsight cancel RUN`: a run ends with a checkpoint, and does not come back by itself (imports no torch).

What keeps it from coming back is the file `cancelled` in its folder, there before anything is signalled: the batch
script asks `launch.cluster.requeue` whether to go back into the queue, which answers no to the jobs named there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from data_pipelines.files import write_json
from launch.cluster.queue import Job, ask_about, has_slurm, queued, user_name
from launch.cluster.status import is_finished, span, status
from launch.run_facts import CANCELLED, RunFacts, find_runs, is_run, read_facts, resolve, runs_of_sweep
from pretrain.survival.history import record

WAIT_SECONDS = 900.0  # a step, and a checkpoint of a large model on a slow file system
POLL_SECONDS = 1.0
#: A signal to tasks that are just starting, or between two steps of a job, reaches nobody: it is sent again.
REPEAT_SECONDS = 10.0
_TOLD_SECONDS = 30.0


class NotCancelledError(OSError):
    """What was to end goes on."""


def cancel(places: Sequence[Path], now: bool, wait: float, say: Callable[[str], None]) -> None:
    """End runs, each with a checkpoint unless `now`, and all jobs that wait for them.

    A place is a run, or the folder of a sweep, whose runs are all ended. Everything is looked at before anything is
    ended. Raises ValueError where nothing is there to end, PermissionError for what is somebody else's, and
    NotCancelledError for runs that have not ended within `wait` seconds.
    """
    runs = [read_facts(folder) for place in places for folder in runs_of(place)]
    there = queued([job for run in runs for job in (*run.jobs, *run.probes)]) if has_slurm() else []
    plans = []
    for run in runs:
        mine = [job for job in there if {job.id, job.number} & set(run.jobs)]
        # a probe job is named by its element, or as a whole where it is no array
        probes = [job for job in there if {job.id, job.number} & set(run.probes)]
        _check_ours(run, [*mine, *probes])
        if mine or probes or run.held:
            plans.append((run, mine, probes))
        elif len(runs) == 1:
            raise ValueError(f"{run.folder} has neither a job in the queue nor a process here: {_what_it_is(run)}")
        else:
            say(f"{run.folder}: {_what_it_is(run)}")
    waiting = []
    for run, jobs, probes in plans:
        if _end(run, jobs, probes, now, say):
            waiting.append((run, jobs))
    if left := _wait(waiting, now, wait, say):
        names = ", ".join(str(run.folder) for run, _ in left)
        raise NotCancelledError(
            f"{names}: not over after {span(wait)}. It will not come back into the queue when it ends; "
            "wait longer with `selfsight cancel` again, or end it without a checkpoint by --now"
        )


def runs_of(place: Path) -> list[Path]:
    """A run, or those of a sweep."""
    place = resolve(place)
    if (swept := runs_of_sweep(place)) is not None:
        return swept
    if not place.is_dir():
        raise FileNotFoundError(
            f"there is no folder {place}; name a run as `selfsight status` shows it, as in runs/NAME"
        )
    if not is_run(place):
        inside = [folder.name for folder in find_runs([place])][:5]
        hint = f"; it holds runs, such as {', '.join(inside)}: name those to end" if inside else ""
        raise ValueError(f"{place} is no run{hint}")
    return [place]


def _check_ours(run: RunFacts, jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.user != user_name() and os.getuid() != 0:
            raise PermissionError(f"job {job.id} of {run.folder} is {job.user}'s; only they can end it")
    if not jobs and run.held is None and run.holder is not None and not run.holder.get("job"):
        host, pid = run.holder.get("host"), run.holder.get("pid")
        # without asking that machine, nobody knows whether the process is still there
        raise ValueError(f"{run.folder} was last trained by process {pid} of {host}; if it still is, cancel it there")


def _end(run: RunFacts, jobs: Sequence[Job], probes: Sequence[Job], now: bool, say: Callable[[str], None]) -> bool:
    """Ask for the end of one run; whether it is one to wait for."""
    running = [job for job in jobs if not job.waits]
    if jobs:
        write_json(
            run.folder / CANCELLED,
            {
                "by": user_name(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "jobs": sorted({name for job in jobs for name in (job.id, job.number)}),
            },
        )
    if probes:
        scancel([job.id for job in probes])
        say(f"{run.folder}: cancelled {_jobs('probe job', probes)}")
    waiting = [job for job in jobs if job.waits]
    if waiting:
        scancel([job.id for job in waiting])
        say(f"{run.folder}: cancelled {_jobs('job', waiting)}, which waited in the queue")
    if running and now:
        scancel([job.id for job in running])
        say(f"{run.folder}: ended {_jobs('job', running)} at once")
    elif running:
        _ask_to_stop(running)
        say(f"{run.folder}: asked {_jobs('job', running)} to write a checkpoint and end")
    elif not jobs and run.held:
        assert run.holder is not None
        pid = int(run.holder["pid"])
        try:
            os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
        except PermissionError:
            raise PermissionError(f"process {pid}, which trains {run.folder}, is somebody else's") from None
        say(f"{run.folder}: {'killed' if now else 'asked'} process {pid}" + ("" if now else " to write a checkpoint"))
    return bool(jobs) or bool(run.held)


def _wait(
    runs: Sequence[tuple[RunFacts, Sequence[Job]]], now: bool, wait: float, say: Callable[[str], None]
) -> list[tuple[RunFacts, Sequence[Job]]]:
    """Wait for the ends, and say what came out; those that have not ended."""
    left, end, told, sent = list(runs), time.monotonic() + wait, time.monotonic(), time.monotonic()
    while left:
        names = [job.id for _, jobs in left for job in jobs]
        there = queued(names) if names else []
        for run, jobs in list(left):
            mine = [job for job in there if job.id in {job.id for job in jobs}]
            back = [job for job in mine if job.waits]
            if back:  # put back by a batch script that does not ask, or by SLURM because a node was lost
                scancel([job.id for job in back])
            elif not mine and not read_facts(run.folder).held:
                left.remove((run, jobs))
                _over(run, jobs, say)
        again = [job for job in there if not job.waits and job.state != "COMPLETING"]
        if again and not now and time.monotonic() - sent > REPEAT_SECONDS:
            sent = time.monotonic()
            _ask_to_stop(again)
        if left and time.monotonic() > end:
            return left
        if left and time.monotonic() - told > _TOLD_SECONDS:
            told = time.monotonic()
            for run, _ in left:
                row = read_facts(run.folder).row or {}
                say(f"{run.folder}: at step {row.get('step', 0)}, waiting for its end")
        if left:
            time.sleep(POLL_SECONDS)
    return []


def _over(run: RunFacts, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    after = read_facts(run.folder)
    if jobs and not is_finished(after):
        last = after.last("submitted", "given_up")
        if last is None or last["event"] != "given_up":  # nobody was there who could say it
            record(run.folder, "given_up", code=None, reason=f"cancelled by {user_name()}")
    with suppress(FileNotFoundError):
        (run.folder / CANCELLED).unlink()  # the history says it now, and the next job of this run may come back
    if is_finished(after):
        say(f"{run.folder}: had finished all its steps")
    elif after.checkpoint is None:
        say(f"{run.folder}: over, without a checkpoint")
    else:
        step = after.checkpoint[0]
        say(f"{run.folder}: over, with the checkpoint of step {step}; the same command continues from there")


def _ask_to_stop(jobs: Sequence[Job]) -> None:
    """USR1 to every task: what a batch script sends when the time limit is near."""
    with suppress(OSError):  # over by now
        ask_about(["scancel", "--signal=USR1", *(job.id for job in jobs)])


def scancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue, running ones too; one that is over by now is no error. Raises OSError."""
    ask_about(["scancel", *dict.fromkeys(jobs)])


def _what_it_is(run: RunFacts) -> str:
    found = status([run.folder])[0]
    return found.state + (f", {found.why}" if found.why else "")


def _jobs(what: str, jobs: Sequence[Job]) -> str:
    names = sorted({job.id for job in jobs})
    return f"{what}{'' if len(names) == 1 else 's'} {', '.join(names)}"
