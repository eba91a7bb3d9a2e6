"""Results of several probes as one, and of several checkpoints as one table (imports no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from eval.agreement import without_labels
from eval.earlier import as_today
from eval.report import Measured, read_results, step_of
from eval.scores import Z95


class Overview(NamedTuple):
    """The measures of all checkpoints of a run on the same data.

    columns: titles. rows: (what, a value for each column or None): the baselines, then the checkpoints, earliest first,
    `step N`. falling: the places of columns of which less is better. best: of each column the places of the checkpoints
    that are best, or not told apart from the best; none where nothing says which way is better, or the checkpoints were
    measured with different settings.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Measured | None]]]
    falling: list[int]
    best: list[list[int]]
    notes: list[str]
    results: list[dict[str, Any]]  # one a checkpoint, all of its probes in it
    mixed: list[str] = []  # noqa: RUF012 - a line for each probe that had other settings at some checkpoints


def conditions_of(results: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same for numbers to stand beside each other. KeyError or TypeError for what is no result."""
    data = results["data"]
    return (
        data["train"]["checksum"], data["val"]["checksum"], data.get("label"), data.get("label_kind", "class"),
        data.get("group_by"), results["target"].get("image_size"), results["target"].get("window"),
        results["target"].get("native", False),
    )  # fmt: skip


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of one encoder under the same conditions as one, with all their probes: of each the newest counts."""
    oldest_first = sorted(map(as_today, results), key=lambda each: str(each.get("started", "")))
    whole = dict(oldest_first[-1])
    if len(oldest_first) == 1:
        return whole
    columns: dict[str, list[dict[str, Any]]] = {}
    for each in oldest_first:
        of_probe: dict[str, list[dict[str, Any]]] = {}
        for column in each["columns"]:
            of_probe.setdefault(column["probe"], []).append(column)
        columns |= of_probe
    rows = [each["rows"] for each in oldest_first]
    num_untrained = max(len(each["untrained"]) for each in rows)
    whole["columns"] = [column for found in columns.values() for column in found]
    whole["rows"] = {
        **rows[-1],
        "pretrained": _together(each["pretrained"] for each in rows),
        "untrained": [
            _together(each["untrained"][place] for each in rows if place < len(each["untrained"]))
            for place in range(num_untrained)
        ],
        "pixels": _together(each["pixels"] or {} for each in rows),
    }
    for lines in ("notes", "warnings"):
        whole[lines] = list(dict.fromkeys(line for each in oldest_first for line in each[lines]))
    whole["protocol"] = _together(each["protocol"] for each in oldest_first)
    return whole


def by_checkpoint(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of one step under the same conditions merged into one; the first step first."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in results:
        found.setdefault((step_of(each), conditions_of(each)), []).append(each)
    return [merged(each) for _, each in sorted(found.items(), key=lambda item: item[0][0])]


def overviews(results: Iterable[dict[str, Any]]) -> list[Overview]:
    """A table for each kind of conditions under which more than one checkpoint was measured; of most measures first."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in by_checkpoint(results):
        alike.setdefault(conditions_of(each), []).append(each)
    found = [_overview(each) for each in alike.values() if len(each) > 1]
    return sorted(found, key=lambda each: -len(each.columns) * len(each.rows))


def preferred(overview: Overview) -> list[str]:
    """Which checkpoints are best by which measure, as far as they are told apart, and which the label-free measures
    prefer, as lines."""
    unlabelled = without_labels(overview.results)
    first = len(overview.rows) - len(overview.results)
    if not overview.best or len(overview.results) < 2:
        return unlabelled
    told: dict[str, list[str]] = {}
    for column, places in zip(overview.columns, overview.best, strict=True):
        if not places:
            continue
        names = [overview.rows[place][0].removeprefix("step ") for place in places]
        every = len(places) == len(overview.rows) - first
        told.setdefault("none told apart" if every else f"step {', '.join(names)}", []).append(column)
    best = "; ".join(f"{which} by {', '.join(by)}" for which, by in told.items())
    return ([f"best checkpoint: {best}"] if told else []) + unlabelled


def _overview(results: list[dict[str, Any]]) -> Overview:
    told = [(step_of(each), read_results(each)) for each in results]
    columns: dict[str, bool] = {}  # and whether less is better
    judged: dict[str, bool] = {}
    for _, each in told:
        for place, column in enumerate(each.columns):
            name = column.rstrip("*")
            columns[name] = place in each.falling
            judged[name] = place not in each.headlines or place in each.judged
    mixed = _mixed(results)
    titles = {c["title"].rstrip("*") for each in results for c in each["columns"] if c["probe"] in mixed}
    rows: list[tuple[str, list[Measured | None]]] = []
    for name in ("chance", "raw pixels", "untrained"):
        beside: dict[str, Measured | None] = {}
        for _, each in told:  # the newest that knows
            beside |= {title: value for title, value in _values(each, name).items() if value is not None}
        if beside:
            rows.append((name, [beside.get(column) for column in columns]))
    first = len(rows)
    for step, each in told:
        ours = _values(each, "pretrained")
        rows.append((f"step {step:,}", [ours.get(column) for column in columns]))
    best = [
        _best([(place, row[1][number]) for place, row in enumerate(rows) if place >= first], columns[name])
        if judged[name] and name not in titles
        else []
        for number, name in enumerate(columns)
    ]
    newest = told[-1][1]
    title = newest.title.replace(f", step {told[-1][0]:,}", "", 1)
    falling = [place for place, less in enumerate(columns.values()) if less]
    lines = list(mixed.values())
    return Overview(title, list(columns), rows, falling, best, [*lines, *newest.notes], results, lines)


def _mixed(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By probe what its settings are at which steps, of probes whose settings differ between checkpoints."""
    found: dict[str, str] = {}
    for probe in dict.fromkeys(column["probe"] for each in results for column in each["columns"]):
        settings = [
            (step_of(each), {**each["protocol"][probe], "seeds": len(each["protocol"].get("seeds", ()))})
            for each in results
            if isinstance(each["protocol"].get(probe), dict) and probe in each["rows"]["pretrained"]
        ]
        keys = sorted({key for _, each in settings for key in each})
        differing = [key for key in keys if len({str(each.get(key)) for _, each in settings}) > 1]
        by_value: dict[str, list[str]] = {}
        for step, each in settings:
            by_value.setdefault(", ".join(f"{key} {each.get(key)}" for key in differing), []).append(f"{step:,}")
        if differing:
            told = "; ".join(f"{value} at step {', '.join(steps)}" for value, steps in by_value.items())
            found[probe] = f"warning: {probe} was measured with different settings, so no checkpoint is best: {told}"
    return found


def _values(told: Any, row: str) -> dict[str, Measured | None]:
    values = dict(told.rows).get(row, [None] * len(told.columns))
    return {column.rstrip("*"): value for column, value in zip(told.columns, values, strict=True)}


def _best(values: Sequence[tuple[int, Measured | None]], less: bool) -> list[int]:
    """The places of the best and of those within the 95 % reach of its standard error."""
    known = [(place, value) for place, value in values if value is not None]
    if len(known) < 2:
        return []
    sign = -1 if less else 1
    top = max((value for _, value in known), key=lambda value: sign * value.share)
    reach = Z95 * (top.error or 0.0)
    return [place for place, value in known if sign * (top.share - value.share) <= reach]


def _together(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        whole |= part
    return whole
