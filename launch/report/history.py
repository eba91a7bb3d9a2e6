"""What became of a run, on the page: its starts, what else happened, the end of its log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data_pipelines.remote.urls import redact
from launch.report import chronicle
from launch.report.markup import Html, element, joined, table
from launch.report.read import Run
from launch.run_facts import runs_of_sweep

_TAIL_LINES, _TAIL_BYTES = 25, 8192


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}"


def chronicle_of(run: Run) -> Html | None:
    """The jobs of a run, what else happened, and the end of its log."""
    jobs = chronicle.jobs_of(run.history)
    rows = [
        (
            job.number,
            job.job or "-",
            job.where,
            _short(job.began),
            chronicle.duration(job.waited),
            chronicle.duration(job.start_up),
            chronicle.duration(chronicle.seconds_of(job)),
            "" if job.first_step is None else f"{job.first_step:,}",
            "" if job.last_step is None else f"{job.last_step:,}",
            "" if job.repeated is None else f"{job.repeated:,}",
            job.outcome or "going on, as far as is known",
        )
        for job in jobs
    ]
    parts: list[Html] = []
    if rows:
        lost = sum(job.waited or 0 for job in jobs)
        again = sum(job.repeated or 0 for job in jobs)
        summary = _count(jobs, "start")
        if len(jobs) > 1:
            summary += f"; {chronicle.duration(lost)} between them; {again:,} steps done again"
        parts.append(element("p", summary, class_="note"))
        header = (
            "start",
            "job",
            "nodes",
            "began (UTC)",
            "waited",
            "start-up",
            "ran",
            "from step",
            "to step",
            "again",
            "how it ended",
        )
        parts.append(table(header, rows, numbers=False))
    others = [event for event in run.history if event.get("event") not in ("started",)]
    if others:
        listed = [
            element(
                "li",
                element("time", _short(str(event.get("time", "")))),
                " ",
                element("b", str(event.get("event", "")).replace("_", " ")),
                " ",
                chronicle.told(event),
                class_="event alarm" if _is_trouble(event) else "event",
            )
            for event in others[-200:]
        ]
        summary = _count(others, "event") + (", the last 200 shown" if len(others) > 200 else "")
        parts.append(element("details", element("summary", summary), element("ol", *listed), open=len(others) <= 12))
    logs = chronicle.logs_of(run.history)
    if logs:
        links = [element("li", _link(run, log)) for log in logs[:20]]
        parts.append(element("details", element("summary", _count(logs, "log file")), element("ul", *links)))
        log, tail = next(((log, text) for log in logs if (text := _tail(run, log))), ("", ""))
        if tail:
            newest = "the newest log" if log == logs[0] else log
            parts.append(element("details", element("summary", f"end of {newest}"), element("pre", tail)))
    return joined(parts) if parts else None


def _is_trouble(event: chronicle.Event) -> bool:
    return event.get("event") in ("alarm", "saved_not", "given_up") and not chronicle.is_over(event)


def _log_path(run: Run, log: str) -> Path:
    path = Path(log)
    return path if path.is_absolute() else run.folder / path


def _link(run: Run, log: str) -> Html:
    return element("a", log, href="file://" + quote(str(_log_path(run, log).absolute())))


def _tail(run: Run, log: str) -> str:
    """The end of a log; empty for what is no file, or lies elsewhere than in the folder of the run or its sweep: the
    page is shared, and whoever can add a line to the history may name any file."""
    try:
        path = _log_path(run, log).resolve()
        if not (path.is_file() and _is_ours(run.folder.resolve(), path)):
            return ""
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return redact("\n".join(file.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]))
    except (OSError, ValueError, RuntimeError):  # a path that can't be: a zero byte in it, links in a circle
        return ""


def _is_ours(run: Path, path: Path) -> bool:
    """Whether `path` lies in the folder of the run, or of a sweep beside it that the run is one of; both resolved."""
    if path.is_relative_to(run):
        return True
    if not path.is_relative_to(run.parent):
        return False
    sweep = run.parent / path.relative_to(run.parent).parts[0]
    return run in (runs_of_sweep(sweep) or ())


def _short(iso: str) -> str:
    """`2026-11-21T13:29:31+00:00` as `2026-11-21 13:29:31`."""
    return iso[:19].replace("T", " ")
