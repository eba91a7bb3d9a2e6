"""Two encoders on the same images: the difference in every measure that both have, and how sure it is.

Both were shown the same images, and most are easy or hard for both. So each draw of the bootstrap takes the same images
for both (or the same groups), and the interval is of their difference: much narrower than two separate ones allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.outcomes import DRAWS, Outcome, read_outcomes, weightings
from eval.report import Measured
from eval.result_files import read_result


@dataclass(frozen=True)
class Measure:
    """A number of one encoder that can be drawn anew.

    column: as results hold it, see `eval.base.Column`. outcome: what each of the images `ids` (m,) came to.
    """

    column: dict[str, Any]
    outcome: Outcome
    ids: Tensor


@dataclass(frozen=True)
class Side:
    """What is known of one encoder on one data set; of several results the newest that has a measure.

    measures: by the name of the column. lacking: titles of columns without outcomes. group_of: by sample number, or
    None without groups.
    """

    name: str
    results: tuple[dict[str, Any], ...]
    measures: dict[str, Measure]
    lacking: tuple[str, ...]
    group_of: dict[int, int] | None

    @property
    def data(self) -> dict[str, Any]:
        """Of the results, which are all of the same."""
        found: dict[str, Any] = self.results[0]["data"]
        return found


def side_of(paths: Sequence[Path]) -> Side:
    """What result files of one encoder on one data set say, with the outcomes beside them; the last of them counts.

    Raises ValueError for a file that is no result.
    """
    results, measures = [], {}
    titles: dict[str, str] = {}
    group_of: dict[int, int] | None = None
    for path in paths:
        result = read_result(path)
        results.append(result)
        titles |= {column["name"]: column["title"].rstrip("*") for column in result["columns"]}
        beside = path.with_suffix(".npz")
        if not beside.is_file():
            continue
        outcomes, ids, groups = read_outcomes(beside)
        if groups is not None:
            group_of = dict(zip(ids.tolist(), groups.tolist(), strict=True))
        for column in result["columns"]:
            outcome = _outcome_of(column, outcomes)
            if outcome is not None:
                rows = outcome.rows if len(outcome.rows) else torch.arange(len(ids))
                measures[column["name"]] = Measure(column, outcome, ids[rows])
    target = results[-1]["target"]
    step = "" if target["step"] is None else f", step {target['step']:,}"
    lacking = tuple(title for name, title in titles.items() if name not in measures)
    return Side(f"{target['name']}{step}", tuple(results), measures, lacking, group_of)


def compared(first: Side, second: Side, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """The difference second - first in every measure of both, as plain JSON values.

    Raises ValueError where the two were measured on different images or labels, or have no measure in common.
    """
    _check_same_data(first, second)
    pairs = list(_pairs(first, second))
    if not pairs:
        raise ValueError(
            f"{first.name} has {_listed(first)} and {second.name} {_listed(second)}: no measure of both of which is "
            "kept what each image came to; probe both once more, with the same probes"
        )
    every = np.unique(np.concatenate([ids for *_, ids in pairs]))
    group_of = first.group_of or second.group_of
    groups = None if group_of is None else torch.tensor([group_of[number] for number in every.tolist()])
    places = [torch.from_numpy(np.searchsorted(every, ids)) for *_, ids in pairs]
    drawn: list[list[Tensor]] = [[] for _ in pairs]
    for weights in weightings(len(every), seed, groups, draws):
        for kept, place, (_, ours, theirs, _) in zip(drawn, places, pairs, strict=True):
            of_pair = weights if len(place) == len(every) else weights[:, place]
            kept.append(theirs.of(of_pair) - ours.of(of_pair))
    rows = []
    for (column, ours, theirs, ids), kept in zip(pairs, drawn, strict=True):
        differences = torch.cat(kept)
        differences = differences[differences.isfinite()]  # a draw may hold no image that a measure is of
        low, high = differences.quantile(torch.tensor([0.025, 0.975])).tolist()
        values = [ours.number(), theirs.number()]
        difference = values[1] - values[0]
        rows.append(
            {
                "name": column["name"], "title": column["title"], "probe": column["probe"],
                "unit": column.get("unit", "percent"), "lower_is_better": bool(column.get("lower_is_better")),
                "label_free": bool(column.get("label_free")), "more": bool(column.get("more")),
                "first": values[0], "second": values[1], "difference": difference,
                "standard_error": float(differences.std()),
                "interval": [min(low, difference), max(high, difference)], "images": len(ids),
            }
        )  # fmt: skip
    return {
        "kind": "comparison",
        "first": {"title": first.name, **first.results[-1]["target"]},
        "second": {"title": second.name, **second.results[-1]["target"]},
        "data": first.data,
        "groups": group_of is not None,
        "draws": draws,
        "seed": seed,
        "measures": rows,
        "notes": list(_notes(first, second, rows, group_of is not None)),
    }


def said(measure: dict[str, Any]) -> str:
    """Which of the two is better by a measure, as far as its 95 % interval tells."""
    low, high = measure["interval"]
    if low <= 0 <= high:
        return "no difference shown"
    if measure["label_free"]:
        return "second is higher" if low > 0 else "second is lower"
    return "second is better" if (low > 0) != measure["lower_is_better"] else "first is better"


def rows_of(comparison: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Lines of a table: measure, first, second, difference with error and interval, what is said of it."""
    lines = []
    for each in comparison["measures"]:
        unit = each["unit"]
        ours, theirs = (str(Measured(each[side], None, None, unit)) for side in ("first", "second"))
        title = f"{each['title']} ↓" if each["lower_is_better"] else each["title"]
        lines.append((title, ours, theirs, _difference(each), said(each)))
    return lines


def _difference(each: dict[str, Any]) -> str:
    """`+1.4 ± 0.6 [0.2, 2.6]`; of shares in points, with as many digits as the error allows."""
    scale = 100 if each["unit"] == "percent" else 1
    error = scale * each["standard_error"]
    digits = 1 if error <= 0 else min(6, max(1 if scale == 100 else 0, 1 - math.floor(math.log10(error))))
    low, high = (f"{scale * end:.{digits}f}" for end in each["interval"])
    return f"{scale * each['difference']:+.{digits}f} ± {error:.{digits}f} [{low}, {high}]"


def _title(measure: Measure) -> str:
    """Of a measure that stands below tables, with the probe that it is of."""
    title = str(measure.column["title"]).rstrip("*")
    return f"{measure.column['probe'].replace('_', '-')}: {title}" if measure.column.get("more") else title


def _pairs(first: Side, second: Side) -> Iterator[tuple[dict[str, Any], Outcome, Outcome, np.ndarray]]:
    """(column, outcome of first, of second, ids) of the images of both, in one order."""
    for column, ours, theirs in _matched(first, second):
        ids, mine, other = np.intersect1d(ours.ids.numpy(), theirs.ids.numpy(), return_indices=True)
        if len(ids):
            yield column, _only(ours.outcome, mine), _only(theirs.outcome, other), ids


def _matched(first: Side, second: Side) -> Iterator[tuple[dict[str, Any], Measure, Measure]]:
    """Measures of one name; and of probes whose headlines are of different features, these headlines."""
    ours, theirs = ({m.column["probe"]: m for m in _headlines(side)} for side in (first, second))
    for probe in ours:
        if probe not in theirs or ours[probe].column["name"] == theirs[probe].column["name"]:
            continue
        titles = [side[probe].column["title"].rstrip("*") for side in (ours, theirs)]
        column = {**ours[probe].column, "title": " against ".join(titles), "name": probe}
        if ours[probe].outcome.statistic == theirs[probe].outcome.statistic:
            yield column, ours[probe], theirs[probe]
    for name, measure in first.measures.items():
        other = second.measures.get(name)
        if other is not None and other.outcome.statistic == measure.outcome.statistic:
            yield {**measure.column, "title": _title(measure)}, measure, other


def _headlines(side: Side) -> Iterator[Measure]:
    return (measure for measure in side.measures.values() if measure.column["headline"])


def _only(outcome: Outcome, rows: np.ndarray) -> Outcome:
    """The outcome of some of its images, in that order."""
    places = torch.from_numpy(rows)
    targets = outcome.targets[places] if len(outcome.targets) else outcome.targets
    return Outcome(outcome.statistic, outcome.values[places], targets)


def _outcome_of(column: dict[str, Any], outcomes: dict[str, Outcome]) -> Outcome | None:
    """By the first path that leads to one; not where the column shows another number of the same score, as top-5."""
    if column.get("key", "top1") not in ("top1", "value"):
        return None
    for path in column["paths"]:
        found = outcomes.get("/".join((column["probe"], *path)))
        if found is not None:
            return found
    return None


def _check_same_data(first: Side, second: Side) -> None:
    ours, theirs = first.data, second.data
    if ours["val"]["checksum"] != theirs["val"]["checksum"]:
        raise ValueError(
            f"{first.name} was measured on {ours['val']['spec']} and {second.name} on {theirs['val']['spec']}, which "
            "hold different samples to test on; a comparison is of the same images: name the data by --data"
        )
    for what in ("label", "label_kind"):
        if ours.get(what) != theirs.get(what):
            raise ValueError(
                f"{first.name} was measured with {what.replace('_', ' ')} {ours.get(what)} and {second.name} with "
                f"{theirs.get(what)}; probe both with the same"
            )
    if None not in (first.group_of, second.group_of) and ours.get("group_by") != theirs.get("group_by"):
        raise ValueError(
            f"{first.name} was measured by groups of {ours.get('group_by')} and {second.name} of "
            f"{theirs.get('group_by')}; probe both with the same --group-by"
        )


def _notes(first: Side, second: Side, rows: Sequence[dict[str, Any]], of_groups: bool) -> Iterator[str]:
    drawn = f"whole {first.data.get('group_by') or second.data.get('group_by')}s" if of_groups else "images"
    yield (
        f"difference: second - first ± its standard error [95 % interval], of a paired bootstrap: {drawn} are drawn, "
        "the same for both"
    )
    if len(rows) > 2:
        yield f"each interval stands for itself: of {len(rows)} without any difference, about 1 in 20 leaves out 0"
    if first.data["train"]["checksum"] != second.data["train"]["checksum"]:
        yield (
            f"warning: heads learned from different train data, {first.data['train']['spec']} and "
            f"{second.data['train']['spec']}; the difference is of both"
        )
    settings = [each.results[-1]["protocol"] for each in (first, second)]
    other = sorted(n for n in {r["probe"] for r in rows} if settings[0].get(n) != settings[1].get(n))
    both = [name for name in other if all(name in each for each in settings)]
    if both:
        yield f"warning: {', '.join(both)} had other settings on either side; the difference is of these, too"
    for side, other_side in ((first, second), (second, first)):
        alone = [_title(m) for n, m in side.measures.items() if n not in other_side.measures]
        if alone:
            yield f"only {side.name} has {', '.join(alone)}"
    if lacking := dict.fromkeys((*first.lacking, *second.lacking)):
        yield f"left out, as it isn't kept what each image came to: {', '.join(lacking)}"


def _listed(side: Side) -> str:
    return ", ".join(measure.column["title"].rstrip("*") for measure in side.measures.values()) or "none"
