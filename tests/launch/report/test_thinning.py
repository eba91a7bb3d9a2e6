from __future__ import annotations

import math

import numpy as np
import pytest

from launch.report.thinning import Thinned


def thinned(values: np.ndarray, limit: int) -> Thinned:
    series = Thinned(limit)
    for step, value in enumerate(values.tolist(), 1):
        series.add(step, value)
    return series


def test_few_values_are_kept_as_they_are() -> None:
    values = np.random.default_rng(0).normal(size=99).round(4)
    columns = thinned(values, limit=50).columns()
    assert columns["x"] == list(range(1, 100))
    assert columns["y"] == pytest.approx(values.tolist())
    assert "lo" not in columns


@pytest.mark.parametrize("count", [101, 4097, 12_345, 100_000])
def test_many_values_become_few_whose_spikes_and_means_are_right(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    values[count // 3], values[count // 2] = 1e4, -1e4
    columns = thinned(values, limit=50).columns()
    assert 25 < len(columns["x"]) <= 100
    assert max(columns["hi"]) == 1e4
    assert min(columns["lo"]) == -1e4
    assert all(low <= mean <= high for low, mean, high in zip(columns["lo"], columns["y"], columns["hi"], strict=True))
    assert columns["x"] == sorted(columns["x"])
    # around the spike, where it is
    place = columns["hi"].index(1e4)
    assert columns["x"][max(0, place - 1)] <= count // 3 + 1 <= columns["x"][min(place + 1, len(columns["x"]) - 1)]


def test_asking_in_between_changes_no_extreme() -> None:
    series, values = Thinned(8), np.random.default_rng(0).normal(size=1000)
    for step, value in enumerate(values.tolist()):
        series.add(step, value)
        if step % 97 == 0:
            series.columns()
    assert series.extent() == (values.min(), values.max())
    assert series.last == values[-1]
    assert series.last_step() == 999


def test_what_is_no_number_is_counted_and_kept_out() -> None:
    series = Thinned()
    for step, value in enumerate([1.0, math.nan, math.inf, 2.0], 1):
        series.add(step, value)
    assert series.columns() == {"x": [1, 4], "y": [1, 2]}
    assert (series.num_bad, series.bad_steps) == (2, [2, 3])
    empty = Thinned()
    empty.add(1, math.nan)
    assert (empty.extent(), empty.last, empty.columns()) == (None, None, {"x": [], "y": []})


def test_steps_that_come_again_replace_what_they_were() -> None:
    series = thinned(np.arange(10.0), limit=50)
    series.rewind(6)
    for step in (6, 7):
        series.add(step, -1.0)
    assert series.columns() == {"x": [1, 2, 3, 4, 5, 6, 7], "y": [0, 1, 2, 3, 4, -1, -1]}
