"""Two encoders on the same images: the difference in every measure that both have, and how sure it is.

Both were shown the same images, and most are easy or hard for both. So each draw of the bootstrap takes the same images
for both (or the same groups), and the interval is of their difference: much narrower than two separate ones allow.

Of few units (images, or groups of them) quantiles of a bootstrap are too near to each other. So both ends are taken
further by what Student's t of as many units less one is beyond the normal, and by the root of n / (n - 1). And where
fewer than six units differ, even one that favours the same encoder in all of them does so by chance in more than one of
twenty cases (2 of 2^5, of all signs): there the interval reaches to 0, and no encoder is said to be better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from eval.outcomes import DRAWS, Outcome, weightings
from eval.report import Measured
from eval.scores import Z95
from eval.sides import Measure, Side, together

#: Of fewer units than that which differ nothing is concluded; fewer than that in all are warned of.
LEAST_DIFFERING, FEW_UNITS = 6, 20


def compared(first: Side, second: Side, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """The difference second - first in every measure of both, as plain JSON values.

    Measures of other labels or groups are left out, with a note. Raises ValueError where the two were measured on
    different images, where this leaves none, or where they have no measure in common.
    """
    _check_same_data(first, second)
    pairs, refused = [], {}
    for column, one, other, ids in _pairs(first, second):
        if (why := _unlike(first, second, one, other)) is None:
            pairs.append((column, one.outcome, other.outcome, ids))
        else:
            refused[column["title"]] = why
    if refused and not pairs:
        raise ValueError(next(iter(refused.values())))
    if not pairs:
        raise ValueError(
            f"{first.name} has {_listed(first)} and {second.name} {_listed(second)}: no measure of both of which is "
            "kept what each image came to; probe both once more, with the same probes"
        )
    every = np.unique(np.concatenate([ids for *_, ids in pairs]))
    known = together([side.group_of for side in (first, second) if side.group_of is not None])
    groups = None
    if known is not None:  # what no result puts into a group is one of its own
        groups = torch.tensor([known.get(number, -1 - number) for number in every.tolist()])
    places = [torch.from_numpy(np.searchsorted(every, ids)) for *_, ids in pairs]
    drawn: list[list[Tensor]] = [[] for _ in pairs]
    for weights in weightings(len(every), seed, groups, draws):
        for kept, place, (_, ours, theirs, _) in zip(drawn, places, pairs, strict=True):
            of_pair = weights if len(place) == len(every) else weights[:, place]
            kept.append(theirs.of(of_pair) - ours.of(of_pair))
    rows = []
    for (column, ours, theirs, ids), place, kept in zip(pairs, places, drawn, strict=True):
        values = [ours.number(), theirs.number()]
        difference = values[1] - values[0]
        if not math.isfinite(difference):
            refused[column["title"]] = f"{column['title']} is not defined of the images of both"
            continue
        units, differing = _units(ours, theirs, place if groups is None else groups[place])
        error, interval = _reach(torch.cat(kept), difference, units, differing)
        rows.append(
            {
                "name": column["name"], "title": column["title"], "probe": column["probe"],
                "unit": column.get("unit", "percent"), "lower_is_better": bool(column.get("lower_is_better")),
                "label_free": bool(column.get("label_free")), "more": bool(column.get("more")),
                "first": values[0], "second": values[1], "difference": difference,
                "standard_error": error, "interval": interval, "images": len(ids), "units": units,
                "differing": differing,
            }
        )  # fmt: skip
    return {
        "kind": "comparison",
        "first": {"title": first.name, **first.results[-1]["target"]},
        "second": {"title": second.name, **second.results[-1]["target"]},
        "data": first.data,
        "groups": groups is not None,
        "draws": draws,
        "seed": seed,
        "measures": rows,
        "notes": [*_notes(first, second, rows, groups is not None), *(f"left out: {why}" for why in refused.values())],
    }


def _units(ours: Outcome, theirs: Outcome, unit: Tensor) -> tuple[int, int]:
    """How many units there are of images (m,) of these units, and in how many of them the two outcomes differ."""
    unlike = (ours.values != theirs.values).reshape(len(unit), -1).any(dim=1)
    return len(unit.unique()), len(unit[unlike].unique())


def _reach(drawn: Tensor, difference: float, units: int, differing: int) -> tuple[float, list[float]]:
    """Standard error and 95 % interval of a difference, of its draws over so many units."""
    drawn = drawn[drawn.isfinite()]  # a draw may hold no image that a measure is of
    if len(drawn) < 2 or units < 2:
        return 0.0, [min(difference, 0.0), max(difference, 0.0)]
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    unbiased = math.sqrt(units / (units - 1))
    further = unbiased * float(student.ppf(0.975, units - 1)) / Z95
    ends = [min(difference, difference + further * (low - difference))]
    ends.append(max(difference, difference + further * (high - difference)))
    if differing < LEAST_DIFFERING:
        ends = [min(ends[0], 0.0), max(ends[1], 0.0)]
    return unbiased * float(drawn.std()), ends


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


def _pairs(first: Side, second: Side) -> Iterator[tuple[dict[str, Any], Measure, Measure, np.ndarray]]:
    """(column, measure of first, of second, ids) of the images of both, in one order."""
    for column, ours, theirs in _matched(first, second):
        ids, mine, other = np.intersect1d(ours.ids.numpy(), theirs.ids.numpy(), return_indices=True)
        if len(ids):
            yield column, _only(ours, mine), _only(theirs, other), ids


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


def _only(measure: Measure, rows: np.ndarray) -> Measure:
    """The measure of some of its images, in that order."""
    places, outcome = torch.from_numpy(rows), measure.outcome
    targets = outcome.targets[places] if len(outcome.targets) else outcome.targets
    return replace(
        measure, outcome=Outcome(outcome.statistic, outcome.values[places], targets), ids=measure.ids[places]
    )


def _check_same_data(first: Side, second: Side) -> None:
    ours, theirs = first.data, second.data
    if ours["val"]["checksum"] != theirs["val"]["checksum"]:
        raise ValueError(
            f"{first.name} was measured on {ours['val']['spec']} and {second.name} on {theirs['val']['spec']}, which "
            "hold different samples to test on; a comparison is of the same images: name the data by --data"
        )


def _unlike(first: Side, second: Side, ours: Measure, theirs: Measure) -> str | None:
    """Why a measure of both is not of the same labels or groups, and what to do; None where it is."""
    mine, other = first.data_of(ours), second.data_of(theirs)
    of = f" in {_title(ours)}"
    for what in ("label", "label_kind"):
        if mine.get(what) != other.get(what):
            return (
                f"{first.name} was measured with {what.replace('_', ' ')} {mine.get(what)} and {second.name} with "
                f"{other.get(what)}{of}; probe both with the same"
            )
    if None not in (mine.get("group_by"), other.get("group_by")) and mine["group_by"] != other["group_by"]:
        return (
            f"{first.name} was measured by groups of {mine['group_by']} and {second.name} of {other['group_by']}{of}; "
            "probe both with the same --group-by"
        )
    return None


def _notes(first: Side, second: Side, rows: Sequence[dict[str, Any]], of_groups: bool) -> Iterator[str]:
    names = {str(name) for s in (first, second) for r in s.results if (name := r["data"].get("group_by"))}
    unit = " and ".join(sorted(names)) or "group"
    drawn = f"whole {unit}s" if of_groups else "images"
    yield (
        f"difference: second - first ± its standard error [95 % interval], of a paired bootstrap: {drawn} are drawn, "
        "the same for both"
    )
    if few := [each for each in rows if each["units"] < FEW_UNITS]:
        least = min(each["units"] for each in few)
        yield (
            f"warning: {', '.join(each['title'] for each in few)}: of {least} {unit if of_groups else 'image'}"
            f"{'s' * (least != 1)} only; the interval is widened by Student's t, and still rough"
        )
    if unclear := [each for each in rows if 0 < each["differing"] < LEAST_DIFFERING and each["difference"]]:
        yield (
            f"warning: {', '.join(each['title'] for each in unclear)}: the two differ in fewer than {LEAST_DIFFERING} "
            f"{f'{unit}s' if of_groups else 'images'}, which may be chance whatever they say: the interval reaches to 0"
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
