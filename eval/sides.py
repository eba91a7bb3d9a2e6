"""What is known of one encoder on one data set: its results, and what each image came to in every measure of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.outcomes import Outcome, read_outcomes
from eval.result_files import read_result


@dataclass(frozen=True)
class Measure:
    """A number of one encoder that can be drawn anew.

    column: as results hold it, see `eval.base.Column`. outcome: what each of the images `ids` (m,) came to. data: of
    the result that it is from; None: as of its side.
    """

    column: dict[str, Any]
    outcome: Outcome
    ids: Tensor
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Side:
    """What is known of one encoder on one data set; of several results the newest that has a measure.

    measures: by the name of the column. lacking: titles of columns without outcomes. group_of: by sample number, of all
    results together, or None without groups.
    """

    name: str
    results: tuple[dict[str, Any], ...]
    measures: dict[str, Measure]
    lacking: tuple[str, ...]
    group_of: dict[int, int] | None

    @property
    def data(self) -> dict[str, Any]:
        """Of the results, which are all of the same; labels and groups may be another's, see `data_of`."""
        found: dict[str, Any] = self.results[0]["data"]
        return found

    def data_of(self, measure: Measure) -> dict[str, Any]:
        """Of the result that a measure is from."""
        return self.data if measure.data is None else measure.data


def side_of(paths: Sequence[Path]) -> Side:
    """What result files of one encoder on one data set say, with the outcomes beside them; the last of them counts.

    Raises ValueError for a file that is no result.
    """
    results, measures = [], {}
    titles: dict[str, str] = {}
    groupings: list[dict[int, int]] = []
    for path in paths:
        result = read_result(path)
        results.append(result)
        titles |= {column["name"]: column["title"].rstrip("*") for column in result["columns"]}
        beside = path.with_suffix(".npz")
        if not beside.is_file():
            continue
        outcomes, ids, groups = read_outcomes(beside)
        if groups is not None:
            groupings.append(dict(zip(ids.tolist(), groups.tolist(), strict=True)))
        for column in result["columns"]:
            outcome = _outcome_of(column, outcomes)
            if outcome is not None:
                rows = outcome.rows if len(outcome.rows) else torch.arange(len(ids))
                measures[column["name"]] = Measure(column, outcome, ids[rows], result["data"])
    target = results[-1]["target"]
    step = "" if target["step"] is None else f", step {target['step']:,}"
    lacking = tuple(title for name, title in titles.items() if name not in measures)
    return Side(f"{target['name']}{step}", tuple(results), measures, lacking, together(groupings))


def together(groupings: Sequence[dict[int, int]]) -> dict[int, int] | None:
    """One grouping of several, each of which numbers groups in its own way: samples that one of them puts together stay
    so. None without any."""
    if not groupings:
        return None
    above: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while (over := above.setdefault(node, node)) != node:
            above[node] = node = above[over]
        return node

    for number, grouping in enumerate(groupings):
        for sample, group in grouping.items():
            above[root(sample)] = root((number, group))
    numbers: dict[Any, int] = {}
    samples = sorted(set().union(*groupings))
    return {sample: numbers.setdefault(root(sample), len(numbers)) for sample in samples}


def _outcome_of(column: dict[str, Any], outcomes: dict[str, Outcome]) -> Outcome | None:
    """By the first path that leads to one; not where the column shows another number of the same score, as top-5."""
    if column.get("key", "top1") not in ("top1", "value"):
        return None
    for path in column["paths"]:
        found = outcomes.get("/".join((column["probe"], *path)))
        if found is not None:
            return found
    return None
