"""What became of a run, for people: its jobs one after the other, what ended each, and what that cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from data_pipelines.wording import counted
from pretrain.config import ALARMS
from pretrain.survival.history import last_told

Event = Mapping[str, Any]
ENDS = ("ended", "restarted", "requeued", "given_up")


@dataclass
class Job:
    """One stay of a run on a cluster, or one start of it anywhere: from `started` to what ended it."""

    number: int
    job: str
    where: str
    began: str  # ISO 8601; empty where no start is recorded
    ended: str
    first_step: int | None
    last_step: int | None
    outcome: str  # in words; empty while it goes on
    waited: float | None  # seconds between the end of the one before and this start
    repeated: int | None  # steps done again, which the one before had done already
    start_up: float | None = None  # seconds from the command to the first step
    events: list[Event] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        """Whether it has told itself how it ended, or a batch script has."""
        return any(event.get("event") in ENDS for event in self.events)


def jobs_of(history: Sequence[Event]) -> list[Job]:
    """The starts of a run, oldest first."""
    jobs: list[Job] = []
    for event in history:
        if event.get("event") == "started":
            before = jobs[-1] if jobs else None
            step = _whole(event.get("step"))
            repeated = None
            if before is not None and step is not None and before.last_step is not None:
                repeated = max(0, before.last_step - step)
            jobs.append(
                Job(
                    number=len(jobs) + 1,
                    job=_job(event),
                    where=_where(event),
                    began=str(event.get("time", "")),
                    ended="",
                    first_step=step,
                    last_step=None,
                    outcome="",
                    waited=_seconds(before.ended or None, event.get("time")) if before else None,
                    repeated=repeated,
                    start_up=_total(event.get("seconds")),
                )
            )
            continue
        if event.get("event") == "ended" and (not jobs or jobs[-1].closed):
            # a start is recorded with its first step: this one did not come so far
            jobs.append(Job(len(jobs) + 1, _job(event), _where(event), "", "", None, None, "", None, None))
        if jobs:
            job = jobs[-1]
            job.events.append(event)
            if event.get("event") in ENDS:
                _close(job, event)
    for job in jobs[:-1]:
        job.outcome = job.outcome or "ended without a word (killed, or its node lost)"
    return jobs


def starts_of(history: Sequence[Event]) -> Iterator[tuple[int, str]]:
    """(step, what happened) of every start but the first."""
    for job in jobs_of(history)[1:]:
        if job.first_step is not None:
            yield job.first_step, f"start {job.number}" + (f" on {job.where}" if job.where else "")


def alarms_of(history: Sequence[Event]) -> list[tuple[int, str]]:
    """(step, text) of every alarm as it begins, and of every checkpoint that could not be written.

    An alarm counts once, though a start may tell again what stood before it; those of steps that were done again are
    those of the last time.
    """
    found: list[tuple[int, str]] = []
    standing: set[str] = set()
    for event in last_told(history):
        step, kind, name = _whole(event.get("step")), event.get("event"), str(event.get("name") or "")
        if kind == "alarm" and is_over(event):
            standing.discard(name)
        elif kind == "alarm" and step is not None and name not in standing:
            found.append((step, _alarm(event)))
            standing |= {name} & set(ALARMS) - {"non_finite"}  # of which each is a step of its own
        elif kind == "saved_not" and step is not None:
            found.append((step, f"no checkpoint: {event.get('reason', '')}"))
    return found


def is_over(event: Event) -> bool:
    """Whether it tells of an alarm that has ended."""
    return event.get("event") == "alarm" and event.get("begins") is False


def told(event: Event) -> str:
    """An event's own words."""
    kind = event.get("event")
    if kind == "alarm":
        return ", ".join([*([] if event.get("step") is None else [f"step {event['step']}"]), _alarm(event)])
    if kind == "started":
        parts = [f"from step {event.get('step')}", counted(event.get("ranks") or 0, "rank"), _where(event)]
        stage = event.get("zero_stage")
        return ", ".join([*filter(None, parts), *([] if stage is None else [f"ZeRO {stage}"])])
    if kind == "submitted":
        command = event.get("command")
        words = " ".join(map(str, command)) if isinstance(command, list) else str(command or "")
        return f"jobs {_listed(event.get('jobs'))}: {words}"
    if kind == "preflight":
        return (
            f"{event.get('text') or ''} {('sick: ' + _listed(event.get('sick'))) if event.get('sick') else ''}".strip()
        )
    parts = [str(event[key]) for key in ("text", "reason") if event.get(key)]
    if event.get("code") is not None:
        parts.append(f"exit code {event['code']}")
    if event.get("step") is not None:
        parts.insert(0, f"step {event['step']}")
    return ", ".join(parts)


def logs_of(history: Sequence[Event]) -> list[str]:
    """Paths of the logs that the history names, newest first."""
    named = [event["log"] for event in history if isinstance(event.get("log"), str)]
    return list(dict.fromkeys(reversed(named)))


def versions_of(history: Sequence[Event]) -> dict[str, str]:
    """The versions that the last start was made with."""
    for event in reversed(history):
        versions = event.get("versions")
        if event.get("event") == "started" and isinstance(versions, Mapping):
            return {str(name): str(version) for name, version in versions.items()}
    return {}


def duration(seconds: float | None) -> str:
    """`3 h 20 min`, `45 s`; empty for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def seconds_of(job: Job) -> float | None:
    """How long a job ran; None while it goes on, or where nothing tells."""
    return _seconds(job.began, job.ended or None)


def _close(job: Job, event: Event) -> None:
    kind = event.get("event")
    if kind == "ended":
        job.ended = str(event.get("time", ""))
        job.last_step = _whole(event.get("step"))
        job.outcome = str(event.get("reason") or "ended")
        return
    job.ended = job.ended or str(event.get("time", ""))
    reason = str(event.get("reason") or "")
    what = {"restarted": "started again in its job", "requeued": "requeued"}.get(str(kind), "given up")
    job.outcome = f"{job.outcome or reason or 'ended'}; {what}" + (
        f": {reason}" if job.outcome and reason and reason not in job.outcome else ""
    )


def _alarm(event: Event) -> str:
    name, text = (str(event.get(key) or "") for key in ("name", "text"))
    if is_over(event):
        return f"{name or 'an alarm'} is {text or 'over'}"
    return ": ".join(filter(None, (name, text))) or "alarm"


def _job(event: Event) -> str:
    if event.get("job") is None:
        return ""
    restart = event.get("restart")
    return f"{event['job']}" + (f", restart {restart}" if restart else "")


def _where(event: Event) -> str:
    nodes = event.get("nodes")
    if isinstance(nodes, list | tuple):
        return _listed(nodes)
    if isinstance(nodes, int) and not isinstance(nodes, bool):
        return f"{nodes} nodes" if nodes != 1 else str(event.get("host") or "1 node")
    return str(nodes or event.get("host") or "")


def _listed(value: Any) -> str:
    if isinstance(value, list | tuple):
        shown = ", ".join(map(str, value[:8]))
        return shown + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in list(value.items())[:8])
    return "" if value is None else str(value)


def _total(seconds: Any) -> float | None:
    """Of the phases of a start-up."""
    if not isinstance(seconds, Mapping):
        return None
    known = [value for value in seconds.values() if isinstance(value, int | float)]
    return float(sum(known)) if known else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(began: Any, ended: Any) -> float | None:
    try:
        return max(0.0, (datetime.fromisoformat(str(ended)) - datetime.fromisoformat(str(began))).total_seconds())
    except (ValueError, TypeError):
        return None
