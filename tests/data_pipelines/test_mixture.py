"""Rows dealt to data sets: exact shares from any row on, the same as counted from the first."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data_pipelines.mixture import Mixture

WEIGHTS: tuple[tuple[Fraction | int, ...], ...] = (
    (1,),
    (1, 1),
    (2, 1),
    (1_281_167, 14_197_122),
    (Fraction("0.7"), Fraction("0.2"), Fraction("0.1")),
    (10**12 + 1, 3, 10**15 + 7, 10**9, 17),
    (1, 10**6),
    tuple(range(1, 9)),
)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_row_is_one_more_of_one_set(weights: tuple[int, ...]) -> None:
    """The places of a set are 0, 1, 2, ... in the order of the rows: counted here one by one."""
    sets, places = Mixture(weights).deal(0, 3000)
    seen: Counter[int] = Counter()
    for number, place in zip(sets.tolist(), places.tolist(), strict=True):
        assert place == seen[number]
        seen[number] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_stretch_is_what_it_is_from_the_first_row_on(weights: tuple[int, ...]) -> None:
    mixture = Mixture(weights)
    sets, places = mixture.deal(0, 3000)
    for first, count in ((0, 1), (1, 1), (7, 500), (1234, 1), (2000, 1000), (1500, 0)):
        again = mixture.deal(first, count)
        np.testing.assert_array_equal(again[0], sets[first : first + count])
        np.testing.assert_array_equal(again[1], places[first : first + count])
        assert mixture.counts(first) == [int((sets[:first] == number).sum()) for number in range(len(weights))]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_shares_are_exact_to_half_a_row_a_set_for_ever(weights: tuple[int, ...]) -> None:
    mixture, total = Mixture(weights), sum(weights)
    for rows in [*range(200), 10**6 + 1, 10**12 + 7, 10**18 + 3]:
        counts = mixture.counts(rows)
        assert sum(counts) == rows
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(weight) / total * rows) <= Fraction(len(weights), 2)
    sets, places = mixture.deal(10**15, 1000)
    before, after = mixture.counts(10**15), mixture.counts(10**15 + 1000)
    for number in range(len(weights)):
        assert places[sets == number].tolist() == list(range(before[number], after[number]))


def test_weights_must_be_positive() -> None:
    for weights in ((), (0,), (1, 0), (1, -2)):
        with pytest.raises(ValueError, match="each must be more than 0"):
            Mixture(weights)
