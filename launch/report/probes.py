"""Probes as plots with error bars beside their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.wording import counted
from eval.earlier import as_today
from eval.milestones import by_checkpoint, conditions_of, overviews, preferred
from eval.report import Measured, Results, read_results, step_of
from launch.report.confused import confused
from launch.report.dots import dots
from launch.report.markup import Html, element, joined, table
from launch.report.read import NO_RESULTS, Run


def probes(run: Run, problems: list[str]) -> Html | None:
    """All checkpoints in a table, then each with a plot beside its numbers: the newest, and earlier ones folded."""
    checkpoints = by_checkpoint(_readable(run, problems))
    if not checkpoints:
        return None
    newest = step_of(checkpoints[-1])  # perhaps by several labels, or sizes of the images
    shown = [_article(each, with_details=True) for each in checkpoints if step_of(each) == newest]
    earlier = [_article(each, with_details=False) for each in checkpoints if step_of(each) != newest]
    parts = [*_overviews(checkpoints), *shown]
    if earlier:
        summary = element("summary", f"{len(earlier)} earlier probe{'s' * (len(earlier) != 1)}")
        parts.append(element("details", summary, *reversed(earlier)))
    return joined(parts)


def _readable(run: Run, problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for name, results in run.probes:
        try:
            read_results(results)
            hash(conditions_of(as_today(results)))
            found.append(results)
        except NO_RESULTS as error:
            problems.append(f"eval/{name} is not a result of `selfsight probe` as this version writes it ({error!r})")
    return found


def _article(results: dict[str, Any], with_details: bool) -> Html:
    """A checkpoint's probes."""
    told = read_results(results)
    rows = [(told.shown(name), values) for name, values in told.rows]
    return element(
        "article",
        element("h3", told.title),
        element(
            "div",
            element("div", dots(told.columns, rows, told.ours), class_="scroll"),
            _table(told.columns, rows, told.falling),
            class_="beside",
        ),
        _further(told),
        confused(told, results) if with_details else None,
        element("ul", *(element("li", note) for note in told.notes), class_="notes"),
    )


def _overviews(checkpoints: Sequence[dict[str, Any]]) -> Iterator[Html]:
    """Measures over checkpoints; where a column says which is better, the best and what is not told apart from it."""
    for each in overviews(checkpoints):
        cells: list[Any] = []
        for place, (name, values) in enumerate(each.rows):
            shown = [
                element("b", value) if value is not None and place in each.best[column] else value
                for column, value in enumerate(values)
            ]
            cells.append((name, shown))
        yield element(
            "article",
            element("h3", f"All checkpoints of {each.title}"),
            _table(each.columns, cells, each.falling, "bold: the best checkpoint, and those within its 95 % reach"),
            *(element("p", line, class_="note") for line in [*each.mixed, *preferred(each)]),
        )


def _table(columns: Sequence[str], rows: Sequence[Any], falling: Sequence[int] = (), *further: str) -> Html:
    """Rows of measured numbers, or of what is shown of them; columns of which less is better are marked."""
    header = [f"{column} ↓" if place in falling else column for place, column in enumerate(columns)]
    numbers = any(isinstance(value, Measured) and value.unit == "percent" for _, values in rows for value in values)
    caption = ["shares in %"] if numbers else []
    caption += [*(["↓: less is better"] if falling else []), *further]
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
    """The step and the results of the newest checkpoint that was probed, all of its probes under the same conditions
    together; of several conditions those of the last probe that was made."""
    found = by_checkpoint(_readable(run, []))
    if not found:
        return None
    last = max(found, key=lambda each: (step_of(each), str(each.get("started", ""))))
    return step_of(last), read_results(last)
