"""What a classifier confuses, and whether it is right as often as it is sure: drawn where a probe's result holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from eval.report import Results
from eval.result_tables import CLASS_COLUMNS, classes_of_pixels
from launch.report.markup import Html, element, joined, table
from launch.report.read import NO_RESULTS

_MOST_CLASSES = 200  # in a table
_MOST_NAMED = 30  # classes whose names fit beside the matrix
_SIDE = 320  # px of the matrix, at least
_LETTERS = 14


def confused(told: Results, results: dict[str, Any]) -> Html | None:
    """The confusion matrix and the reliability diagram of every probe of the pretrained row that has them, and what is
    said of each class of pixels."""
    found = []
    for probe, result in results["rows"]["pretrained"].items():
        try:
            if isinstance(result, dict) and (rows := list(classes_of_pixels(result))):
                found.append(joined([element("h4", f"{probe}: classes"), _of_classes(rows)]))
        except NO_RESULTS:
            continue
    for probe, measures in _measures(results):
        drawn: list[Html] = []
        for draw in (matrix, _reliability):
            try:
                drawn += [made] if (made := draw(measures, results)) is not None else []
            except NO_RESULTS:  # of another version: the numbers beside it stand
                continue
        if drawn:
            found.append(joined([element("h4", probe), element("div", *drawn, class_="beside")]))
    if not found:
        return None
    return element("details", element("summary", "What it confuses, and how sure it may be"), *found, open=True)


def _of_classes(rows: Sequence[Sequence[Any]]) -> Html:
    """A row a class, shares in %."""
    shown = [(name, *("-" if share is None else f"{100 * share:.1f}" for share in shares)) for name, *shares in rows]
    return table(CLASS_COLUMNS, shown[:_MOST_CLASSES], caption="shares in %")


def _measures(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for probe, result in results["rows"]["pretrained"].items():
        if isinstance(result, dict) and isinstance(result.get("measures"), dict):
            yield probe, result["measures"]


def matrix(measures: dict[str, Any], results: dict[str, Any]) -> Html | None:
    """Rows the true class, columns what it was taken for; the darker, the larger a share of the row."""
    counts: list[list[int]] = measures.get("confusion") or []
    if not counts:
        return None
    num = len(counts)
    classes = [str(each) for each in measures.get("names") or results["data"].get("classes") or range(num)]
    names = [name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…" for name in classes]
    cell = max(4, min(26, _SIDE // num))
    named = num <= _MOST_NAMED and cell >= 10
    left = 8 + 7 * max(map(len, names)) if named else 16
    marks: list[Html] = []
    for true, row in enumerate(counts):
        total = sum(row)
        if named:
            y = left + cell * true + cell / 2 + 4
            marks.append(element("text", names[true], x=left - 5, y=f"{y:.0f}", text_anchor="end"))
            x, top = left + cell * true + cell / 2 + 4, left - 5
            turn = f"rotate(-90 {x:.0f} {top})"
            marks.append(element("text", names[true], x=f"{x:.0f}", y=top, transform=turn))
        for taken, count in enumerate(row):
            if not count:
                continue
            words = f"{classes[true]} taken for {classes[taken]}: {count:,} of {total:,}"
            kind = "cell right" if true == taken else "cell wrong"
            marks.append(
                element(
                    "rect", element("title", words), x=left + cell * taken, y=left + cell * true, width=cell - 1,
                    height=cell - 1, class_=kind, fill_opacity=f"{0.06 + 0.94 * count / total:.3f}",
                )
            )  # fmt: skip
    side = left + cell * num
    marks.append(element("rect", x=left, y=left, width=cell * num, height=cell * num, class_="frame"))
    right, every = sum(counts[place][place] for place in range(num)), sum(map(sum, counts))
    drawn = element(
        "svg", *marks, viewBox=f"0 0 {side + 4} {side + 4}", width=side + 4, height=side + 4, class_="matrix",
        role="img", aria_label=f"confusion matrix of {num} classes: {right:,} of {every:,} images taken for their own",
    )  # fmt: skip
    worst = _worst(counts, classes)
    caption = element("figcaption", f"rows: true class, columns: taken for{worst}", class_="note")
    return element("figure", drawn, caption, class_="drawn")


def _worst(counts: list[list[int]], classes: Sequence[str]) -> str:
    """The three most frequent mistakes."""
    wrong = [
        (count / max(1, sum(row)), count, true, taken)
        for true, row in enumerate(counts)
        for taken, count in enumerate(row)
        if true != taken and count
    ]
    most = sorted(wrong, reverse=True)[:3]
    parts = [f"{classes[true]} for {classes[taken]} {100 * share:.0f} %" for share, _, true, taken in most]
    return f"; most often {', '.join(parts)}" if parts else ""


def _reliability(measures: dict[str, Any], results: dict[str, Any]) -> Html | None:
    """How often it is right where it is so sure; on the line, as often as it says."""
    bins = measures.get("reliability") or []
    if not bins:
        return None
    left, top, side = 34, 10, 220
    largest = max(each["count"] for each in bins)
    marks: list[Html] = [element("path", d=f"M{left} {top + side}L{left + side} {top}", class_="reference")]
    for tick in range(0, 101, 25):
        x, y = left + side * tick / 100, top + side * (1 - tick / 100)
        marks.append(element("line", x1=left, x2=left + side, y1=y, y2=y, class_="grid"))
        marks.append(element("text", tick, x=left - 5, y=y + 4, text_anchor="end"))
        marks.append(element("text", tick, x=x, y=top + side + 15, text_anchor="middle"))
    for each in bins:
        x, y = left + side * each["confidence"], top + side * (1 - each["accuracy"])
        words = f"{each['count']:,} images: sure {100 * each['confidence']:.1f} %, right {100 * each['accuracy']:.1f} %"
        radius = 2 + 7 * (each["count"] / largest) ** 0.5
        marks.append(
            element("circle", element("title", words), cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", class_="ours")
        )
    every = sum(each["count"] for each in bins)
    gap = sum(each["count"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / every
    drawn = element(
        "svg", *marks, viewBox=f"0 0 {left + side + 12} {top + side + 22}", width=left + side + 12,
        height=top + side + 22, class_="dots reliability", role="img",
        aria_label=f"reliability: on average {100 * gap:.1f} points between how sure it is and how often it is right",
    )  # fmt: skip
    caption = element(
        "figcaption",
        f"how often it is right (up), where it is so sure (across), in %; on average {100 * gap:.1f} points apart",
        class_="note",
    )
    return element("figure", drawn, caption, class_="drawn")
