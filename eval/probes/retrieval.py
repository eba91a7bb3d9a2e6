"""Retrieval: do the images of a query's class come first, when train is sorted by cosine similarity to it?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import Outcome, scored
from eval.statistics import blind_average_precision

RECALL_AT = (1, 5, 10)
#: Similarities that are sorted at once: 64 MiB of int32.
_AT_ONCE = 2**24
#: What similarities are multiplied with to be sorted as whole numbers: a power of two, so that nothing is rounded that
#: float32 tells apart above 1/32.
_SCALE = 2.0**29
_SORTERS = 2


@dataclass(frozen=True)
class RetrievalSettings:
    """How many val images are asked for: all, with `full`; else as many as can be compared with train in
    `most_pairs` similarities, and `fewest` at least, drawn by the first seed."""

    full: bool = False
    most_pairs: int = 2**28
    fewest: int = 1000


def ranked(train: Tensor, queries: Tensor, relevant: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(m,) average precision of each query, and (m,) the place of its first relevant image, 0 for the nearest.

    train: (n, d), queries: (m, d), compared by cosine. relevant: classes of train (n,) and of the queries (m,), of
    which equal ones are relevant; or of any number of classes an image, (n, c) and (m, c) of 0 and 1: those that share
    one. Average precision is the mean of precision at each relevant image. Of equal similarities, those that aren't
    relevant come first, so that features that tell nothing apart gain nothing. A query of which nothing is relevant has
    0, and n.
    """
    of_train, of_queries = relevant
    train = F.normalize(train.float(), dim=1)
    of_train, of_queries = of_train.to(train.device), of_queries.to(train.device)
    precision = torch.zeros(len(queries), dtype=torch.float64)
    first = torch.full((len(queries),), len(train))
    size = max(1, _AT_ONCE // len(train))
    for begin in range(0, len(queries), size):
        asked = F.normalize(queries[begin : begin + size].to(train.device).float(), dim=1)
        mine = of_queries[begin : begin + size]
        same = mine[:, None] == of_train if of_train.ndim == 1 else mine.float() @ of_train.float().T > 0
        # ascending: the nearest has the smallest number, and the last bit says whether it is relevant
        keys = ((asked * -_SCALE) @ train.T).to(torch.int32).mul_(2).add_(same)
        row, place = np.nonzero(_sorted(keys) & 1)  # row by row
        count = np.bincount(row, minlength=len(asked))
        start = np.cumsum(count) - count
        nth = np.arange(len(row)) - start[row] + 1
        total = np.bincount(row, weights=nth / (place + 1), minlength=len(asked))
        precision[begin : begin + size] = torch.from_numpy(total / np.maximum(count, 1))
        known = np.flatnonzero(count)
        first[begin + torch.from_numpy(known)] = torch.from_numpy(place[start[known]])
    return precision.float(), first


def _sorted(keys: Tensor) -> np.ndarray:
    """(b, n) each row in ascending order; numpy's sort of whole numbers is 20 times as fast as torch's on a CPU."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values.cpu().numpy()
    rows = keys.numpy()
    with ThreadPoolExecutor(_SORTERS) as pool:  # it lets go of the interpreter's lock
        list(pool.map(lambda part: part.sort(axis=1), np.array_split(rows, _SORTERS)))
    return rows


def run(store: Store, settings: RetrievalSettings) -> Scores:
    """Mean average precision and recall of val's images among train's, on the headline feature."""
    train, val, name = store.train, store.val, store.headline
    able = torch.arange(len(val.labels))
    if val.labels.ndim == 2:  # of no class at all: nothing is like it
        able = able[val.labels.any(dim=1)]
    most = len(able) if settings.full else max(settings.fewest, settings.most_pairs // len(train.labels))
    if most < len(able):
        generator = torch.Generator().manual_seed(store.seeds[0])
        rows = able[torch.randperm(len(able), generator=generator)[:most]].sort().values
    else:
        rows = able
    store.progress(f"retrieval: {len(rows):,} queries among {len(train.labels):,} images")
    precision, first = ranked(
        train.inputs[name].to(store.device), val.inputs[name][rows], (train.labels, val.labels[rows])
    )
    groups = None if val.groups is None else val.groups[rows]
    relevant, num = _relevant(train.labels, val.labels[rows]), len(train.labels)

    def told(values: Tensor) -> Scores:
        return scored(Outcome("mean", values, rows=rows), groups=groups)

    return {
        "input": name,
        "queries": len(rows),
        "of": len(val.labels),
        "mean_average_precision": told(precision),
        "recall": {str(k): told((first < k).float()) for k in RECALL_AT},
        "blind": float(blind_average_precision(num, relevant).mean()),
        "blind_recall": {str(k): blind_recall(num, relevant, k) for k in RECALL_AT},
    }


def _relevant(train: Tensor, queries: Tensor) -> Tensor:
    """(m,) float64 how many of train's images are relevant to each query."""
    if train.ndim == 1:
        counts = torch.bincount(train, minlength=int(queries.max()) + 1)
        return counts[queries].double()
    combinations, of = torch.unique(train, dim=0, return_counts=True)
    return ((queries.float() @ rearrange(combinations.float(), "k c -> c k")) > 0).double() @ of.double()


def blind_recall(num: int, relevant: Tensor, k: int) -> float:
    """How often one of the relevant (m,) of `num` images is among the first k of a random order, over queries."""
    missed = torch.ones_like(relevant)
    for drawn in range(min(k, num)):  # one after the other, none of them relevant
        missed *= ((num - relevant - drawn) / (num - drawn)).clamp_min(0)
    return float((1 - missed).mean())


def columns(result: Scores, headline: str) -> list[Column]:
    """Mean average precision; recalls beside it for those who look."""
    found = [
        Column("retrieval", "retrieval mAP", (("mean_average_precision",),), key="value", chance=result["blind"]),
    ]
    for k, blind in result["blind_recall"].items():
        title = f"recall at {k}"
        found.append(Column(f"recall_{k}", title, (("recall", k),), False, key="value", chance=blind, more=True))
    return found


def notes(result: Scores, settings: RetrievalSettings) -> list[str]:
    """What was asked for, and how many of val."""
    which = "all" if result["queries"] == result["of"] else f"{result['queries']:,} of {result['of']:,}"
    return [
        f"retrieval: {which} held-out images as queries among train by cosine of {result['input']}; recall at k: one "
        "of its class is among the first k"
    ]


SPEC = ProbeSpec("retrieval", run, columns, RetrievalSettings, labels=("class", "grade", "several"), notes=notes)
