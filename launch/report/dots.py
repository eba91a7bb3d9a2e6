"""Measured numbers as points with their intervals, a panel a column; the table beside it has the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.report import Measured
from launch.report.markup import Html, element, joined

Row = tuple[str, Sequence[Measured | None]]
_LEFT, _WIDTH, _ROW, _GAP, _TOP = 84, 230, 19, 26, 24  # px: names of rows, a panel, a row, between panels, above
_ABREAST = 3  # panels
_MOST_TICKS = 5


def dots(columns: Sequence[str], rows: Sequence[Row], ours: str = "pretrained") -> Html:
    """Every column as a panel with an axis of its own; of shares from 0 on, of other numbers as they lie. `ours` is
    the row that stands out."""
    panels = range(len(columns))
    return joined(
        element("div", _drawing([columns[place] for place in panels[first : first + _ABREAST]], [
            (name, values[first : first + _ABREAST]) for name, values in rows
        ], ours))
        for first in range(0, len(columns), _ABREAST)
    )  # fmt: skip


def axis_of(values: Sequence[Measured]) -> tuple[float, float, float]:
    """The lowest and the highest number that an axis has, and the step of its ticks."""
    low = min((value.interval[0] if value.interval else value.share for value in values), default=0.0)
    high = max((value.interval[1] if value.interval else value.share for value in values), default=1.0)
    shares = all(value.unit == "percent" for value in values)
    if shares or 0 <= low < high / 2:
        low = min(low, 0.0)
    high = high + 0.08 * (high - low)
    if shares:
        high = min(high, 1.0)
    if not high > low:  # all alike, or none
        low, high = low - 0.5, low + 0.5
    return low, high, _step(high - low)


def _step(reach: float) -> float:
    """The smallest round number of which no more than `_MOST_TICKS` fit."""
    size = 10.0 ** math.floor(math.log10(reach / _MOST_TICKS))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if reach / (factor * size) <= _MOST_TICKS)


def _drawing(columns: Sequence[str], rows: Sequence[Row], ours: str) -> Html:
    height = _ROW * len(rows) + 34
    marks: list[Html] = []
    for number, (name, _) in enumerate(rows):
        marks.append(element("text", name, x=_LEFT - 8, y=_middle(number) + 4, class_="label", text_anchor="end"))
    for place, column in enumerate(columns):
        known = [value for _, values in rows if (value := values[place]) is not None]
        low, high, step = axis_of(known)
        percent = all(value.unit == "percent" for value in known)
        start = _LEFT + place * (_WIDTH + _GAP)

        def across(value: float, start: float = start, low: float = low, high: float = high) -> float:
            return start + (min(max(value, low), high) - low) / (high - low) * _WIDTH

        marks.append(element("text", column, x=start, y=12, class_="label strong"))
        for tick in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
            x = f"{across(tick * step):.1f}"
            marks.append(element("line", x1=x, x2=x, y1=20, y2=height - 14, class_="grid"))
            label = f"{(100 if percent else 1) * tick * step:.4g}"
            marks.append(element("text", label, x=x, y=height - 2, class_="tick", text_anchor="middle"))
        for number, (name, values) in enumerate(rows):
            if (value := values[place]) is None:
                continue
            y, kind = _middle(number), "ours" if name == ours else "other"
            if value.interval:
                ends = [across(end) for end in value.interval]
                path = f"M{ends[0]:.1f} {y - 4}v8m0 -4H{ends[1]:.1f}m0 -4v8"
                marks.append(element("path", d=path, class_=f"error {kind}"))
            title = element("title", f"{name}: {value}{' %' if value.unit == 'percent' else ''}")
            marks.append(element("circle", title, cx=f"{across(value.share):.1f}", cy=y, r=2.5, class_=kind))
    wide = _LEFT + len(columns) * (_WIDTH + _GAP)
    return element(
        "svg", *marks, viewBox=f"0 0 {wide} {height}", width=wide, height=height, class_="dots", role="img",
        aria_label="; ".join(f"{name}: " + ", ".join(str(v) for v in values if v is not None) for name, values in rows),
    )  # fmt: skip


def _middle(number: int) -> int:
    return _TOP + _ROW * number + 8
