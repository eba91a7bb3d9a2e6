"""Probe results for people: the same table for the terminal and for a text file."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any, NamedTuple

from rich.table import Table

from eval.base import Scores, Unit
from eval.earlier import as_today
from eval.scores import Z95, deviation_of, mean_of

_MOST_COLUMNS = 3


class Measured(NamedTuple):
    """A number with its standard error and its 95 % interval; None of them for chance.

    share: of 0 .. 1 where it is shown in percent, which is `unit`; else a number as it is.
    """

    share: float
    error: float | None
    interval: tuple[float, float] | None = None
    unit: Unit = "percent"

    def __str__(self) -> str:
        digits = None if not self.error else min(6, max(0, 1 - math.floor(math.log10(self.error))))

        def shown(value: float) -> str:
            if self.unit == "percent":
                return f"{100 * value:.1f}"
            return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"  # two digits of the error

        error = "" if self.error is None else f" ± {shown(self.error)}"
        within = "" if self.interval is None else " [{}, {}]".format(*map(shown, self.interval))
        return f"{shown(self.share)}{error}{within}"


class Results(NamedTuple):
    """A probe in words and numbers: `rows` are (name, a value for each of `columns` or None); `headlines` are the
    places of the columns that stand for the whole; `more` and `more_rows` the same of what not all look at.

    falling: the places of columns of which less is better. judged: of those headlines by which an encoder may be called
    better or worse: not what is measured without labels, which tells encoders apart but not which one is better.
    ours: what the row `pretrained` is called where it is shown. data: what the images to test on are called.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Measured | None]]]
    notes: list[str]
    headlines: list[int]
    more: list[str] = []  # noqa: RUF012
    more_rows: list[tuple[str, list[Measured | None]]] = []  # noqa: RUF012
    falling: list[int] = []  # noqa: RUF012
    judged: list[int] = []  # noqa: RUF012
    ours: str = "pretrained"
    data: str = ""

    def shown(self, row: str) -> str:
        """What a row is called where people see it."""
        return self.ours if row == "pretrained" else row


def probe_table(results: dict[str, Any]) -> Table:
    """Rows chance, raw pixels, untrained and pretrained; accuracy in % with its standard error over val."""
    told = read_results(results)
    table = Table(title=told.title, caption="\n".join(told.notes), caption_justify="left")
    header, rows = _laid_out(told)
    for place, column in enumerate(header):
        table.add_column(column, justify="right" if place else "left", style="bold" if column == told.ours else None)
    for name, *cells in rows:
        table.add_row(name, *cells, style="bold" if name == told.ours else None)
    return table


def markdown_table(results: dict[str, Any]) -> str:
    """The same, as a Markdown table with its notes below."""
    told = read_results(results)
    header, rows = _laid_out(told)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{told.title}**\n\n{table}\n\n" + "\n".join(f"- {note}" for note in told.notes) + "\n"


def _laid_out(told: Results) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a column for each measure, or a line where there are more than a terminal has room for."""
    header, lines = ["", *told.columns], [[told.shown(name), *map(_cell, values)] for name, values in told.rows]
    if len(told.columns) <= _MOST_COLUMNS:
        return header, lines
    turned = [list(line) for line in zip(header, *lines, strict=True)]
    return turned[0], turned[1:]


def read_results(results: dict[str, Any]) -> Results:
    """What a file of `eval/` says, of earlier versions too; no probe is imported. KeyError or TypeError for others."""
    results = as_today(results)
    columns = [column for column in results["columns"] if not column.get("more")]
    more = [column for column in results["columns"] if column.get("more")]
    titles = [column["title"] for column in columns]
    headlines = [i for i, c in enumerate(columns) if c["headline"]]
    more_rows = _rows(results, more)
    notes = _notes(results) + _more_notes(more, more_rows)
    more_titles = [f"{column['probe']}: {column['title']}" for column in more]
    falling = [i for i, c in enumerate(columns) if c.get("lower_is_better")]
    judged = [i for i in headlines if not columns[i].get("label_free")]
    rows = _rows(results, columns)
    ours = "fine-tuned" if results["target"].get("method") == "finetune" else "pretrained"
    return Results(
        _title(results), titles, rows, notes, headlines, more_titles, more_rows, falling, judged, ours, data_of(results)
    )


def _rows(results: dict[str, Any], columns: list[dict[str, Any]]) -> list[tuple[str, list[Measured | None]]]:
    """The table's rows: chance, raw pixels, untrained, pretrained; without those that have nothing to say."""
    rows = results["rows"]
    cells: list[tuple[str, list[Measured | None]]] = []
    if any(blind := [_blind(column, rows["chance"]) for column in columns]):
        cells.append(("chance", blind))
    for label, scores in (
        ("raw pixels", [rows["pixels"]]),
        ("untrained", rows["untrained"]),
        ("pretrained", [rows["pretrained"]]),
    ):
        if scores:
            found = [_over_seeds([score_of(each, column) for each in scores], column) for column in columns]
            cells.append((label, found))
    return cells


def _blind(column: dict[str, Any], chance: Scores) -> Measured | None:
    """What is reached blindly; columns of earlier versions are all accuracies."""
    value = column.get("chance", "most_frequent")
    share = chance.get("most_frequent_class") if value == "most_frequent" else value
    return None if share is None else Measured(share, None, None, column.get("unit", "percent"))


def _more_notes(more: list[dict[str, Any]], rows: list[tuple[str, list[Measured | None]]]) -> list[str]:
    """`linear: balanced accuracy 71.2 ± 1.4 (untrained 33.0)`, one line a probe."""
    by_row = dict(rows)
    lines: dict[str, list[str]] = {}
    for place, column in enumerate(more):
        ours, fresh = (by_row.get(row, [None] * len(more))[place] for row in ("pretrained", "untrained"))
        if ours is not None:
            beside = "" if fresh is None else f" (untrained {fresh._replace(error=None, interval=None)})"
            lines.setdefault(column["probe"], []).append(f"{column['title']} {ours._replace(interval=None)}{beside}")
    return [f"{probe}: {'; '.join(parts)}" for probe, parts in lines.items()]


def step_of(results: Any) -> int:
    """Of the checkpoint that was probed; 0 where nothing says so."""
    try:
        return int(results["target"]["step"] or 0)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return 0


def score_of(scores: Scores, column: dict[str, Any]) -> Scores | None:
    """The score that a column shows of a row's results; None where the row has none."""
    for path in column["paths"]:
        found = scores.get(column["probe"])
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return found
    return None


def _cell(measured: Measured | None) -> str:
    return "-" if measured is None else str(measured)


def data_of(results: dict[str, Any]) -> str:
    """What the images to test on are called: the folder, or the last part of an address; empty where it is not said."""
    return PurePath(str(results["data"]["val"].get("spec") or "")).name


def _title(results: dict[str, Any]) -> str:
    target, data = results["target"], results["data"]
    step = "" if target["step"] is None else f", step {target['step']:,}"
    named = f" of {name}" if (name := data_of(results)) else ""
    if _is_label_free(results):
        return f"{target['name']}{step}: on {data['train']['num_labelled']:,} train images{named}, without labels"
    kind, label = data.get("label_kind", "class"), data.get("label")
    what = "top-1 % on" if kind == "class" else "on"
    of = f"{label}: " if label else ""
    classes = (
        f", {data['num_classes']} {'grades' if kind == 'grade' else 'classes'}" if kind not in (None, "number") else ""
    )
    return (
        f"{target['name']}{step}: {of}{what} {data['val']['num_labelled']:,} {data['val'].get('split', 'val')} "
        f"images{named}, {data['train']['num_labelled']:,} to learn from{classes}"
    )


def _is_label_free(results: dict[str, Any]) -> bool:
    """Whether all that was measured is of train's images alone."""
    return bool(results["columns"]) and all(column.get("label_free") for column in results["columns"])


def _over_seeds(found: list[Scores | None], column: dict[str, Any]) -> Measured | None:
    """A number ± standard error; of several seeds the mean, and the larger of that error and the seeds' deviation."""
    known = [score for score in found if score is not None]
    if not known:
        return None
    shares = [score[column.get("key", "top1")] for score in known]
    unit: Unit = column.get("unit", "percent")
    share, error = mean_of(shares), mean_of([score["standard_error"] for score in known])
    low, high = (mean_of([score["interval"][end] for score in known]) for end in (0, 1))
    if (deviation := deviation_of(shares) or 0.0) > error:
        error, reach = deviation, Z95 * deviation
        low, high = min(low, share - reach), max(high, share + reach)
        if unit == "percent":
            low, high = max(0.0, low), min(1.0, high)
    return Measured(share, error, (low, high), unit)


def _notes(results: dict[str, Any]) -> list[str]:
    uniform = results["rows"]["chance"].get("uniform")
    held_out, group = results["data"]["val"].get("split", "val"), results["data"].get("group_by")
    of_classes = results["data"].get("label_kind", "class") == "class"
    accuracies = [column.get("key", "top1") == "top1" for column in results["columns"]] if of_classes else [False]
    wilson = (
        "Wilson" if all(accuracies) else "of accuracies Wilson's, else a bootstrap" if any(accuracies) else "bootstrap"
    )
    how = f"bootstrap over {group}s" if group else wilson
    if _is_label_free(results):
        return [*(f"warning: {line}" for line in results["warnings"]), *results["notes"]]
    blind = "" if uniform is None else f"; chance is the most frequent class (1 / classes: {100 * uniform:.1f})"
    return [
        *(f"warning: {line}" for line in results["warnings"]),
        f"± is the standard error over {held_out}, [ ] the 95 % interval ({how}){blind}",
        *results["notes"],
    ]
