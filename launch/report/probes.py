"""Probes as plots with error bars beside their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipelines.wording import counted
from eval.report import Results, read_results
from launch.report.dots import Row, dots
from launch.report.markup import Html, element, joined, table
from launch.report.read import NO_RESULTS, Run


def probes(run: Run, problems: list[str]) -> Html | None:
    """Every probe: a plot with error bars beside its table."""
    shown = []
    for name, results in sorted(run.probes, key=lambda probe: _step_of(probe[1])):
        try:
            told = read_results(results)
        except NO_RESULTS as error:
            problems.append(f"eval/{name} is not a result of `selfsight probe` as this version writes it ({error!r})")
            continue
        notes = element("ul", *(element("li", note) for note in told.notes), class_="notes")
        shown.append(
            element(
                "article",
                element("h3", told.title),
                element(
                    "div",
                    element("div", dots(told.columns, told.rows), class_="scroll"),
                    _table(told.columns, told.rows, told.falling),
                    class_="beside",
                ),
                _further(told),
                notes,
            )
        )
    if not shown:
        return None
    *earlier, last = shown
    if not earlier:
        return last
    return joined([last, element("details", element("summary", f"{len(earlier)} earlier probes"), *reversed(earlier))])


def _table(columns: Sequence[str], rows: Sequence[Row], falling: Sequence[int] = ()) -> Html:
    """Rows of measured numbers; columns of which less is better are marked."""
    header = [f"{column} ↓" if place in falling else column for place, column in enumerate(columns)]
    units = {value.unit for _, values in rows for value in values if value is not None}
    caption = ["shares in %"] if "percent" in units else []
    caption += ["↓: less is better"] if falling else []
    cells = [(row, *("-" if value is None else value for value in values)) for row, values in rows]
    return table(["", *header], cells, "; ".join(caption))


def _further(told: Results) -> Html | None:
    """The numbers that not all look at, turned round: one a line, as there may be many."""
    if not told.more:
        return None
    names = [name for name, _ in told.more_rows]
    lines = [
        (title, *("-" if values[place] is None else values[place] for _, values in told.more_rows))
        for place, title in enumerate(told.more)
    ]
    return element("details", element("summary", counted(len(told.more), "further number")), table(["", *names], lines))


def probes_compared(runs: Sequence[Run]) -> Html | None:
    """The pretrained row of each run's newest probe, beside the untrained one, as one table."""
    found = [(f"{run.name}, step {probe[0]:,}", probe[1]) for run in runs if (probe := newest(run)) is not None]
    if len(found) < 2:
        return None
    columns = list(dict.fromkeys(column.rstrip("*") for _, told in found for column in told.columns))
    rows = []
    for name, told in found:
        values = {row: dict(zip((c.rstrip("*") for c in told.columns), cells, strict=True)) for row, cells in told.rows}
        shown = []
        for column in columns:
            ours, fresh = (values.get(row, {}).get(column) for row in ("pretrained", "untrained"))
            beside = "" if fresh is None else f" ({fresh._replace(error=None, interval=None)})"
            shown.append("-" if ours is None else f"{ours}{beside}")
        rows.append((name, *shown))
    return table(["", *columns], rows, "the newest probe of each run, shares in % (untrained)")


def newest(run: Run) -> tuple[int, Results] | None:
    """The step and the results of the newest probe that can be read; of several of a step, the last that was made."""
    found = sorted(run.probes, key=lambda probe: (_step_of(probe[1]), _started(probe[1])), reverse=True)
    for _, results in found:
        try:
            return _step_of(results), read_results(results)
        except NO_RESULTS:
            continue
    return None


def _step_of(results: Any) -> int:
    try:
        return int(results["target"]["step"] or 0)
    except NO_RESULTS:
        return 0


def _started(results: Any) -> str:
    return str(results.get("started", "")) if isinstance(results, dict) else ""
