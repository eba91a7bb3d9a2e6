"""Which row of a batch shows what, where rows are of unlike size: every part of the batch has about as many patches.

The order is a function of the step alone. It does not ask into how many parts the batch falls: halves are alike, and
quarters, and so on down to the parts of the smallest prime factors of the batch, so that ranks and micro-batches, any
number of them, have like work.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from data_pipelines.sampler import Row, Sampler
from data_pipelines.transforms import native_shape
from data_pipelines.transforms.config import Views

_KEPT_STEPS = 8


class BalancedRows:
    """The rows of each step: those of the sampler, in an order of equal work where crops keep their own shape.

    Args:
        sampler: Which samples a batch shows.
        views: The crops, whose areas are drawn from what is known of a row before its image is read.
    """

    def __init__(self, sampler: Sampler, views: Views) -> None:
        self._sampler, self._views = sampler, views
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, list[Row]] = OrderedDict()

    def rows(self, step: int, rows: range) -> list[Row]:
        """The rows of these numbers, out of 0 .. B - 1, of global batch `step`."""
        if not self._views.native:
            return self._sampler.rows(step, rows)
        with self._lock:
            if step not in self._kept:
                self._kept[step] = self._ordered(step)
                while len(self._kept) > _KEPT_STEPS:
                    self._kept.popitem(last=False)
            return self._kept[step][rows.start : rows.stop]

    def _ordered(self, step: int) -> list[Row]:
        sampler = self._sampler
        rows = sampler.rows(step, range(sampler.batch_size))
        groups = [rows[first : first + sampler.repeats] for first in range(0, len(rows), sampler.repeats)]
        costs = patches_of(self._views, sampler.seed, rows).reshape(-1, sampler.repeats).sum(axis=1)
        return [row for number in balanced(costs) for row in groups[number]]


def patches_of(views: Views, seed: int, rows: list[Row]) -> np.ndarray:
    """(n,) int64: the patches that all crops of each row may have together."""
    numbers = np.array(rows, dtype=np.int64)
    dataset, sample, epoch, repeat = numbers.T
    return native_shape.tokens_of(views, seed, dataset, epoch, sample, repeat).sum(axis=0)


def balanced(costs: np.ndarray) -> list[int]:
    """The numbers of things of these costs (n,), ordered so that halves of the order cost alike, and halves of these.

    The dearest first, each goes to the part that has cost least so far and has room; within the parts likewise. Where
    a number does not halve, it falls into as many parts as its smallest prime factor.
    """
    cost = costs.tolist()
    return _split(sorted(range(len(cost)), key=lambda number: -cost[number]), cost)


def _split(members: list[int], cost: list[int]) -> list[int]:
    if len(members) < 2:
        return members
    count = next(n for n in range(2, len(members) + 1) if len(members) % n == 0)
    if count == 2:
        return [member for part in _halves(members, cost) for member in _split(part, cost)]
    room, sums = len(members) // count, [0] * count
    parts: list[list[int]] = [[] for _ in range(count)]
    for member in members:
        chosen = min((total, number) for number, total in enumerate(sums) if len(parts[number]) < room)[1]
        parts[chosen].append(member)
        sums[chosen] += cost[member]
    return [member for part in parts for member in _split(part, cost)]


def _halves(members: list[int], cost: list[int]) -> tuple[list[int], list[int]]:
    """What `_split` makes of an even number, a few times as fast."""
    room, ahead = len(members) // 2, 0  # what the first half has cost beyond the second
    first: list[int] = []
    second: list[int] = []
    for member in members:
        if len(second) == room or (ahead <= 0 and len(first) < room):
            first.append(member)
            ahead += cost[member]
        else:
            second.append(member)
            ahead -= cost[member]
    return first, second
