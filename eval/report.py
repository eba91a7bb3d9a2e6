"""Probe results for people: the same table for the terminal and for a text file."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table

from eval.base import Scores
from eval.earlier import as_today
from eval.scores import Z95, deviation_of, mean_of


class Measured(NamedTuple):
    """A share in 0 .. 1 with its standard error and its 95 % interval; None of them for chance."""

    share: float
    error: float | None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {100 * self.error:.1f}"
        within = "" if self.interval is None else " [{:.1f}, {:.1f}]".format(*(100 * end for end in self.interval))
        return f"{100 * self.share:.1f}{error}{within}"


class Results(NamedTuple):
    """A probe in words and numbers: `rows` are (name, a value for each of `columns` or None); `headlines` are the
    places of the columns that stand for the whole."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Measured | None]]]
    notes: list[str]
    headlines: list[int]


def probe_table(results: dict[str, Any]) -> Table:
    """Rows chance, raw pixels, untrained and pretrained; accuracy in % with its standard error over val."""
    told = read_results(results)
    table = Table(title=told.title, caption="\n".join(told.notes), caption_justify="left")
    table.add_column("")
    for column in told.columns:
        table.add_column(column, justify="right")
    for name, values in told.rows:
        table.add_row(name, *map(_cell, values), style="bold" if name == "pretrained" else None)
    return table


def markdown_table(results: dict[str, Any]) -> str:
    """The same, as a Markdown table with its notes below."""
    told = read_results(results)
    lines = [["", *told.columns], ["---", *["---:"] * len(told.columns)]]
    lines += [[name, *map(_cell, values)] for name, values in told.rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{told.title}**\n\n{table}\n\n" + "\n".join(f"- {note}" for note in told.notes) + "\n"


def read_results(results: dict[str, Any]) -> Results:
    """What a file of `eval/` says, of earlier versions too; no probe is imported. KeyError or TypeError for others."""
    results = as_today(results)
    rows, columns = results["rows"], results["columns"]
    blind = Measured(rows["chance"]["most_frequent_class"], None)
    cells: list[tuple[str, list[Measured | None]]] = [("chance", [blind] * len(columns))]
    for label, scores in (
        ("raw pixels", [rows["pixels"]]),
        ("untrained", rows["untrained"]),
        ("pretrained", [rows["pretrained"]]),
    ):
        if scores:
            cells.append((label, [_over_seeds([score_of(each, column) for each in scores]) for column in columns]))
    titles = [column["title"] for column in columns]
    return Results(_title(results), titles, cells, _notes(results), [i for i, c in enumerate(columns) if c["headline"]])


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


def _title(results: dict[str, Any]) -> str:
    target, data = results["target"], results["data"]
    step = "" if target["step"] is None else f", step {target['step']:,}"
    return (
        f"{target['name']}{step}: top-1 % on {data['val']['num_labelled']:,} {data['val'].get('split', 'val')} images, "
        f"{data['train']['num_labelled']:,} to learn from, {data['num_classes']} classes"
    )


def _over_seeds(found: list[Scores | None]) -> Measured | None:
    """Accuracy ± standard error; of several seeds the mean, and the larger of that error and the seeds' deviation."""
    known = [score for score in found if score is not None]
    if not known:
        return None
    shares = [score["top1"] for score in known]
    share, error = mean_of(shares), mean_of([score["standard_error"] for score in known])
    low, high = (mean_of([score["interval"][end] for score in known]) for end in (0, 1))
    if (deviation := deviation_of(shares) or 0.0) > error:
        error, reach = deviation, Z95 * deviation
        low, high = min(low, max(0.0, share - reach)), max(high, min(1.0, share + reach))
    return Measured(share, error, (low, high))


def _notes(results: dict[str, Any]) -> list[str]:
    uniform = 100 * results["rows"]["chance"]["uniform"]
    return [
        *(f"warning: {line}" for line in results["warnings"]),
        f"± is the standard error over {results['data']['val'].get('split', 'val')}, [ ] the 95 % interval (Wilson); "
        f"chance is the most frequent class (1 / classes: {uniform:.1f})",
        *results["notes"],
    ]
