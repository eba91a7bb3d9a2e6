"""`selfsight probe RUN --follow`: the milestone checkpoints of a run, probed as they appear until it is over."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.remote.urls import redact
from launch.cluster.queue import queued
from pretrain.survival.history import read_history
from pretrain.survival.stopping import EXIT_STOPPED

POLL_SECONDS = 30.0
#: A run of which no job is queued is over; looked at twice, because a requeue takes a moment.
_LOOKS = 2


def follow_run(
    run: Path,
    data: str,
    measure: Callable[[str], Any],
    protocol: Mapping[str, Any] | None = None,
    group_by: str | None = None,
    label: str | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> int:
    """Probe every milestone of `run` that has no result yet, until the run is over; how many were probed.

    A result counts where it is of `data`, `group_by` and `label`, and of all that `protocol` asks for. A checkpoint
    that can't be probed is told of and left; it does not hold up the others.
    """
    left: set[Path] = set()
    probed, over = 0, 0
    while True:
        over = over + 1 if is_over(run) else 0  # looked at before the milestones: none can appear behind it unseen
        for checkpoint in milestones(run):
            if checkpoint in left or has_result(run, checkpoint, data, protocol or {}, group_by, label):
                continue
            try:
                measure(str(checkpoint))
                probed += 1
            except (ValueError, OSError) as error:
                print(f"{checkpoint} can't be probed: {error}", flush=True)
            left.add(checkpoint)
            break  # another may be finished by now, and the run over
        else:
            if over >= _LOOKS:
                return probed
            time.sleep(poll_seconds)


def end_when_asked() -> None:
    """From now on, a signal (the job's time limit, preemption) ends this process at once with exit code 85.

    Nothing has to be saved: what it was at is done again by the next start, and results are there whole or not at all.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(EXIT_STOPPED))


def milestones(run: Path) -> Iterator[Path]:
    """The checkpoints that are kept for good, oldest first."""
    for path in sorted((run / "checkpoints").glob("step-*")):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, KeyError):
            continue
        if state.get("milestone"):
            yield path


def has_result(
    run: Path,
    checkpoint: Path,
    data: str,
    protocol: Mapping[str, Any],
    group_by: str | None,
    label: str | None = None,
) -> bool:
    """Whether `eval/` holds a probe of this step on this data, with all of these probes and their settings."""
    step = int(checkpoint.name.partition("-")[2])
    for path in (run / "eval").glob(f"probe-{step}-*.json"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            same = result["data"]["train"]["spec"] == redact(data)
            same = same and group_by in (None, result["data"].get("group_by"))  # None: as the data were packed
            same = same and result["data"].get("label") == label
            if same and all(result["protocol"].get(name) == asked for name, asked in protocol.items()):
                return True
        except (OSError, ValueError, KeyError):
            continue
    return False


def is_over(run: Path) -> bool:
    """Whether nothing will train this run any more, as far as its history and SLURM's queue say."""
    events = read_history(run)
    last = next((e for e in reversed(events) if e["event"] in ("submitted", "started", "requeued", "given_up")), None)
    if last is not None and last["event"] == "given_up":
        return True
    jobs = [str(job) for event in events if event["event"] == "submitted" for job in event.get("jobs", ())]
    try:
        return not queued(jobs)
    except OSError:  # SLURM does not answer: what the run has left says whether it is finished
        return (run / "encoder" / "config.json").is_file()
