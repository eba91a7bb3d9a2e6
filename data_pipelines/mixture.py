"""Which of several data sets each row is from: exact shares, found for any row without looking at those before it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class Mixture:
    """Rows 0, 1, 2, ... without end, dealt out to data sets in proportion to their weights.

    Set k of K has had within K / 2 rows of its share, `weight * g` of the first g, whatever g is. The first set takes
    every row at which its rounded share grows by one, the second one likewise of the rows that the first one leaves,
    and so on; so how many rows each has had before row g takes K exact divisions.

    Args:
        weights: Of each data set, positive; what counts is their ratio.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"the weights are {[float(weight) for weight in weights]}; each must be more than 0")
        total = sum(map(Fraction, weights))
        self.shares = tuple(Fraction(weight) / total for weight in weights)
        # of the rows that earlier sets leave; the last set takes them all
        self._of_rest = [share / sum(self.shares[k:]) for k, share in enumerate(self.shares)]

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each set has."""
        counts = []
        for share in self._of_rest:
            counts.append(_rounded(rows, share)[0])
            rows -= counts[-1]
        return counts

    def deal(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For rows `first` to `first + count - 1`: the set (count,), and the number of the row among that set's own."""
        sets, places = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        rest_before, rest = first, np.arange(count + 1)  # rows left by earlier sets: before `first`, and from there on
        for k, share in enumerate(self._of_rest):
            before, remainder = _rounded(rest_before, share)
            divisor, multiplier = 2 * share.denominator, 2 * share.numerator
            fits = remainder + count * multiplier < 2**62
            taken = (remainder + (rest if fits else rest.astype(object)) * multiplier) // divisor
            taken = taken.astype(np.int64)
            own = np.diff(taken) > 0
            sets[own], places[own] = k, before + taken[:-1][own]
            rest_before, rest = rest_before - before, rest - taken
        return sets, places


def _rounded(rows: int, share: Fraction) -> tuple[int, int]:
    """`rows * share` rounded to the nearest, and what is left over, in parts of twice the denominator."""
    return divmod(2 * rows * share.numerator + share.denominator, 2 * share.denominator)
