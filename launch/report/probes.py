"""Probes as plots with error bars beside their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.report import Results, read_results
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
        rows = [(row, *("-" if value is None else value for value in values)) for row, values in told.rows]
        notes = element("ul", *(element("li", note) for note in told.notes), class_="notes")
        shown.append(
            element(
                "article",
                element("h3", told.title),
                element(
                    "div",
                    element("div", _plot(told), class_="scroll"),
                    table(["", *told.columns], rows, "top-1 in %"),
                    class_="beside",
                ),
                notes,
            )
        )
    if not shown:
        return None
    *earlier, last = shown
    if not earlier:
        return last
    return joined([last, element("details", element("summary", f"{len(earlier)} earlier probes"), *reversed(earlier))])


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
            shown.append("-" if ours is None else f"{ours}" + ("" if fresh is None else f" ({100 * fresh.share:.1f})"))
        rows.append((name, *shown))
    return table(["", *columns], rows, "the newest probe of each run: top-1 in % (untrained)")


def newest(run: Run) -> tuple[int, Results] | None:
    """The step and the results of the newest probe that can be read; of several of a step, the last that was made."""
    found = sorted(run.probes, key=lambda probe: (_step_of(probe[1]), _started(probe[1])), reverse=True)
    for _, results in found:
        try:
            return _step_of(results), read_results(results)
        except NO_RESULTS:
            continue
    return None


def _plot(told: Results) -> Html:
    """Rows as points with their error, one panel a column; read by eye, the table beside it has the numbers."""
    left, width, row_height, gap = 84, 230, 19, 26
    values = [value for _, row in told.rows for value in row if value is not None]
    top = min(1.0, max([value.interval[1] if value.interval else value.share for value in values], default=1.0) * 1.08)
    height = row_height * len(told.rows) + 34
    marks: list[Html] = []
    for number, (name, _) in enumerate(told.rows):
        y = 24 + row_height * number + 8
        marks.append(element("text", name, x=left - 8, y=y + 4, class_="label", text_anchor="end"))
    step = next(size for size in (0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if top / size <= 5 or size == 0.5)
    for place, column in enumerate(told.columns):
        start = left + place * (width + gap)
        marks.append(element("text", column, x=start, y=12, class_="label strong"))
        for tick in range(int(top / step + 1e-9) + 1):
            x = start + tick * step / top * width
            marks.append(element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=20, y2=height - 14, class_="grid"))
            marks.append(
                element(
                    "text", f"{100 * tick * step:g}", x=f"{x:.1f}", y=height - 2, class_="tick", text_anchor="middle"
                )
            )
        for number, (name, row) in enumerate(told.rows):
            if (value := row[place]) is None:
                continue
            y, x = 24 + row_height * number + 8, start + value.share / top * width
            kind = "ours" if name == "pretrained" else "other"
            if value.interval:
                low, high = (start + end / top * width for end in value.interval)
                path = f"M{low:.1f} {y - 4}v8m0 -4H{high:.1f}m0 -4v8"
                marks.append(element("path", d=path, class_=f"error {kind}"))
            title = element("title", f"{name}: {value} %")
            marks.append(element("circle", title, cx=f"{x:.1f}", cy=y, r=2.5, class_=kind))
    wide = left + len(told.columns) * (width + gap)
    return element(
        "svg", *marks, viewBox=f"0 0 {wide} {height}", width=wide, height=height, class_="dots", role="img",
        aria_label="; ".join(f"{name}: " + ", ".join(str(v) for v in row if v is not None) for name, row in told.rows),
    )  # fmt: skip


def _step_of(results: Any) -> int:
    try:
        return int(results["target"]["step"] or 0)
    except NO_RESULTS:
        return 0


def _started(results: Any) -> str:
    return str(results.get("started", "")) if isinstance(results, dict) else ""
