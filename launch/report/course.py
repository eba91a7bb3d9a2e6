"""Of a run that goes on from released weights: which step is best, and whether it is worse than the start now."""

from __future__ import annotations

from typing import NamedTuple

from launch.report.read import Run
from launch.report.verdict import Kind
from pretrain.tracking.course import Course, measured_rows


class Told(NamedTuple):
    """A sentence and its colour."""

    kind: Kind
    words: str


def course_of(run: Run) -> Told | None:
    """What opens the page of a run that was measured from before its first step; None of others."""
    if run.setting("continuing") is None:
        return None
    course = Course.of(measured_rows(run.folder / "metrics.jsonl"))
    words = course.words()
    if words is None:
        return None
    better = course.best is not None and course.best.step > 0
    kind: Kind = "bad" if course.is_worse else "good" if better else "unsure"
    return Told(kind, f"{words[0].upper()}{words[1:]}.")
