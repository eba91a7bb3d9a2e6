"""Probe results for people: the same table for the terminal and for a text file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from rich.table import Table

from eval.scores import HEADLINE_K, deviation_of, mean_of

Scores = dict[str, Any]


class Measured(NamedTuple):
    """A share in 0 .. 1 with its standard error; None of it for chance."""

    share: float
    error: float | None

    def __str__(self) -> str:
        return f"{100 * self.share:.1f}" + ("" if self.error is None else f" ± {100 * self.error:.1f}")


class Results(NamedTuple):
    """A probe in words and numbers: `rows` are (name, a value for each of `columns` or None)."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Measured | None]]]
    notes: list[str]


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
    """What a file of `eval/` says; KeyError or TypeError for one of another version."""
    columns, rows = _cells(results)
    return Results(_title(results), columns, rows, _notes(results))


def _cell(measured: Measured | None) -> str:
    return "-" if measured is None else str(measured)


def _title(results: dict[str, Any]) -> str:
    target, data = results["target"], results["data"]
    step = "" if target["step"] is None else f", step {target['step']:,}"
    return (
        f"{target['name']}{step}: top-1 % on {data['val']['num_labelled']:,} {data['val'].get('split', 'val')} images, "
        f"{data['train']['num_labelled']:,} to learn from, {data['num_classes']} classes"
    )


def _cells(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[Measured | None]]]]:
    rows, pretrained = results["rows"], results["rows"]["pretrained"]
    columns: list[tuple[str, Callable[[Scores], Scores | None]]] = []
    for name in pretrained["knn"]:
        mark = "*" if name == pretrained["headline"] and len(pretrained["knn"]) > 1 else ""
        columns.append((f"k-NN {name}{mark}", partial(_knn, name=name)))
    columns.append(("linear", lambda scores: scores["linear"]))
    if "logistic" in pretrained:
        columns.append(("logistic", lambda scores: scores.get("logistic")))

    blind = Measured(rows["chance"]["most_frequent_class"], None)
    cells: list[tuple[str, list[Measured | None]]] = [("chance", [blind] * len(columns))]
    for label, scores in (
        ("raw pixels", [rows["pixels"]]),
        ("untrained", rows["untrained"]),
        ("pretrained", [pretrained]),
    ):
        if scores:
            cells.append((label, [_over_seeds([read(score) for score in scores]) for _, read in columns]))
    return [name for name, _ in columns], cells


def _knn(scores: Scores, name: str) -> Scores | None:
    by_k = scores["knn"].get(name, scores["knn"].get("pixels"))
    return None if by_k is None else by_k[str(HEADLINE_K)]


def _over_seeds(found: list[Scores | None]) -> Measured | None:
    """Accuracy ± standard error; of several seeds the mean, and the larger of that error and the seeds' deviation."""
    known = [score for score in found if score is not None]
    if not known:
        return None
    shares = [score["top1"] for score in known]
    error = max(mean_of([score["standard_error"] for score in known]), deviation_of(shares) or 0.0)
    return Measured(mean_of(shares), error)


def _notes(results: dict[str, Any]) -> list[str]:
    rows, protocol = results["rows"], results["protocol"]
    scores = rows["pretrained"]
    linear, chosen = scores["linear"], scores["linear"]["chosen"]
    spread = linear["std_over_seeds"]
    notes = [
        f"k = {HEADLINE_K}, T = {protocol['temperature']:g}; ± is the standard error over val; "
        f"chance is the most frequent class (1 / classes: {100 * rows['chance']['uniform']:.1f})",
        f"linear: on {chosen['input']}{', standardised' if chosen['standardised'] else ''}, "
        f"lr {chosen['learning_rate']:g} x batch / 256, chosen on {100 * protocol['linear']['held_out']:g} % "
        f"held out of train ({100 * chosen['held_out']:.1f} there); {protocol['linear']['epochs']} epochs on "
        f"{protocol['features']}; "
        + (f"std over {len(linear['top1_of_seed'])} seeds {100 * spread:.2f}" if spread is not None else "one seed"),
    ]
    if len(scores["knn"]) > 1:
        notes.insert(1, f"headline (*): {scores['headline']}")
    if linear["at_grid_edge"]:
        notes.append("the chosen rate is at the edge of the grid: a wider grid may do better")
    if "logistic" in scores:
        logistic = scores["logistic"]
        edge = ", at the edge of the grid" if logistic["at_grid_edge"] else ""
        notes.append(f"logistic: on {logistic['input']}, C {logistic['chosen']:.2g} of {len(logistic['grid'])}{edge}")
    return notes
