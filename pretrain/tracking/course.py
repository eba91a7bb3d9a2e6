"""Whether a run that goes on from released weights got better or worse than these (imports no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: What decides, the first that the start was measured by: its standard error, the share of the start's value that
#: counts as a difference where there is no error, and its name.
JUDGES: dict[str, tuple[str | None, float, str]] = {
    "knn_top1": ("knn_standard_error", 0.0, "k-NN"),
    "slice_rankme": (None, 0.1, "RankMe"),
}
_ERRORS = 2.0  # of the difference from which on it is told


@dataclass(frozen=True)
class Point:
    """A measurement after `step` steps."""

    step: int
    value: float
    error: float = 0.0


@dataclass
class Course:
    """The start's measurement, the best since, and the last."""

    judge: str | None = None
    start: Point | None = None
    best: Point | None = None
    last: Point | None = None

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Mapping[str, float]]]) -> Course:
        """That of the rows of a run's metrics, from step 0 on."""
        course = cls()
        for step, metrics in rows:
            course.take(step, metrics)
        return course

    def take(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take a measurement in; whether it is the best, better than the start's too."""
        if step == 0:
            self.judge = next((name for name in JUDGES if name in metrics), None)
        if self.judge is None or self.judge not in metrics:
            return False
        error = JUDGES[self.judge][0]
        self.last = Point(step, metrics[self.judge], metrics.get(error, 0.0) if error else 0.0)
        if step == 0:
            self.start = self.best = self.last
            return False
        assert self.best is not None
        if self.last.value <= self.best.value:
            return False
        self.best = self.last
        return True

    @property
    def is_worse(self) -> bool:
        """Whether the last measurement is worse than the start's, by two errors of the difference, or a tenth."""
        if self.start is None or self.last is None or self.judge is None:
            return False
        margin = _ERRORS * math.hypot(self.start.error, self.last.error) + JUDGES[self.judge][1] * self.start.value
        return self.last.value < self.start.value - margin

    def words(self) -> str | None:
        """`step 40 is best by k-NN (38.1% against the start's 34.0%); now, at step 80, it is worse than the start
        (30.2%)`; None before anything was compared."""
        if self.start is None or self.last is None or self.best is None or self.judge is None or not self.last.step:
            return None
        name = JUDGES[self.judge][2]
        if self.best.step == 0:
            first = f"the start is best by {name} ({self._told(self.start)})"
        else:
            first = (
                f"step {self.best.step:,} is best by {name} ({self._told(self.best)} against the start's "
                f"{self._told(self.start)})"
            )
        if self.last.step == self.best.step:
            return f"{first}; that is now"
        state = "worse than the start" if self.is_worse else "not shown to be worse than the start"
        return f"{first}; now, at step {self.last.step:,}, it is {state} ({self._told(self.last)})"

    def _told(self, point: Point) -> str:
        return f"{point.value:.1%}" if self.judge == "knn_top1" else f"{point.value:.1f}"


def measured_rows(path: Path, step: int | None = None) -> list[tuple[int, dict[str, float]]]:
    """Of the rows of a run's metrics, up to `step` if it is given, what a course is made of."""
    wanted = {*JUDGES, *(error for error, _, _ in JUDGES.values() if error)}
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the line that a killed run was writing
            continue
        metrics = {name: row[name] for name in wanted & row.keys() if isinstance(row[name], float)}
        if metrics and (step is None or row["step"] <= step):
            found.append((row["step"], metrics))
    return found
