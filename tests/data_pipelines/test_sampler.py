"""The sampler: several data sets in exact shares, each in passes of its own, and data that grow meanwhile."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from data_pipelines.order import Order
from data_pipelines.sampler import Row, Sampler


class Sizes:
    """What the sampler asks of a data set, without any shards."""

    def __init__(self, *shard_sizes: int) -> None:
        self.shard_sizes, self.num_samples = shard_sizes, sum(shard_sizes)
        self.shards = shard_sizes
        self.checksum = hashlib.sha256(repr(shard_sizes).encode()).hexdigest()


def sampler(*datasets: Sizes, **settings: Any) -> Sampler:
    return Sampler(datasets, **{"seed": 3, "batch_size": 24, "window": 16} | settings)  # type: ignore[arg-type]


def batch(shown: Sampler, step: int) -> list[Row]:
    return shown.rows(step, range(shown.batch_size))


def begun_earlier(shown: Sampler) -> Sampler:
    """The same of a run whose checkpoints are of before rows were permuted."""
    state = json.loads(json.dumps(shown.state()))
    assert state.pop("rows") == "permuted"
    earlier = Sampler.continued(state, shown.datasets)
    assert earlier.state() == state
    return earlier


def test_one_data_set_is_shown_in_its_own_order() -> None:
    """As before there were mixtures: a run of then goes on."""
    data = Sizes(40, 0, 33, 71)
    one, order = begun_earlier(sampler(data)), Order(3, data.shard_sizes, 24, window=16)
    for step in (0, 1, 5, 6, 7, 1000):
        expected = [Row(0, sample, step // 6) for sample in order.ids(step).tolist()]
        assert batch(one, step) == expected
        assert one.rows(step, range(6, 18)) == expected[6:18]
    assert one.steps_per_epoch == 6


def test_the_rows_of_a_mixture_are_pinned() -> None:
    """A run of today resumes under the release of tomorrow, so these numbers never change."""
    mixed = sampler(Sizes(40, 9), Sizes(31), Sizes(5, 6), weights=(2, 0.7, 0.3), repeats=2)
    for shown, expected in ((mixed, "e262b66528b7e3bc"), (begun_earlier(mixed), "5679dd56f63bfd08")):
        rows = [tuple(row) for step in (0, 1, 17, 12345) for row in batch(shown, step)]
        assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_are_permuted_within_their_batch(repeats: int) -> None:
    mixed = sampler(Sizes(400, 90), Sizes(310), weights=(2, 1), repeats=repeats)
    earlier = begun_earlier(mixed)
    orders = set()
    for step in (0, 1, 2, 500):
        now, before = batch(mixed, step), batch(earlier, step)
        assert now != before
        assert sorted(now) == sorted(before)
        orders.add(tuple(before.index(row) for row in now))
    assert len(orders) == 4  # another one each step
    again = Sampler.continued(json.loads(json.dumps(mixed.state())), mixed.datasets)
    assert batch(again, 7) == batch(mixed, 7)
    with pytest.raises(ValueError, match="ordered by 'otherwise', which this version does not know"):
        Sampler.continued(mixed.state() | {"rows": "otherwise"}, mixed.datasets)


def test_the_rows_of_a_rank_are_of_all_lanes() -> None:
    """On data sorted by class: 16 lanes of 32 samples a batch, 16 classes of 1,024."""
    sorted_data = sampler(Sizes(*[1024] * 16), batch_size=512, lanes=16, window=1024)
    share = range(64, 96)  # of rank 2 of 16
    for shown, least, most in ((begun_earlier(sorted_data), 1, 2), (sorted_data, 8, 16)):
        classes = {row.sample // 1024 for row in shown.rows(3, share)}
        assert least <= len(classes) <= most


@pytest.mark.parametrize("seed", range(12))
def test_every_set_shows_each_sample_once_a_pass_up_to_its_remainder(seed: int) -> None:
    """Any sizes, weights, batch, window, repeats, ranks: within each pass all are different, and few are left out."""
    draw = random.Random(seed)
    data = [Sizes(*(draw.randrange(30, 90) for _ in range(draw.randrange(1, 4)))) for _ in range(draw.randrange(1, 5))]
    repeats, ranks = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3, 4])
    size = repeats * ranks * draw.randrange(1, 5)
    weights = [draw.choice([0.1, 1, 2.5, 7]) for _ in data] if draw.random() < 0.7 else None
    mixed = sampler(*data, seed=seed, batch_size=size, weights=weights, repeats=repeats, window=draw.choice([1, 8, 64]))
    share, steps = size // ranks, 3 * sum(d.num_samples for d in data) // size + 2
    shown: dict[tuple[int, int], Counter[int]] = {}
    counts: Counter[int] = Counter()
    for step in range(steps):
        rows = batch(mixed, step)
        parts = [mixed.rows(step, range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
        assert list(itertools.chain(*parts)) == rows
        for row in rows:
            shown.setdefault((row.dataset, row.epoch), Counter())[row.sample] += 1
            counts[row.dataset] += 1
        for place in range(0, size, repeats):
            assert [row.repeat for row in rows[place : place + repeats]] == list(range(repeats))
            assert len({row[:3] for row in rows[place : place + repeats]}) == 1
    last = {number: max(epoch for key, epoch in shown if key == number) for number in counts}
    for (number, epoch), samples in shown.items():
        assert set(samples.values()) == {repeats}
        part = mixed.segments[0].parts[number]
        if epoch < last[number]:
            assert len(samples) == part.pass_length > data[number].num_samples - part.batch_size
    total = sum(part.weight for part in mixed.segments[0].parts)
    for number, part in enumerate(mixed.segments[0].parts):
        expected = float(part.weight / total) * steps * size
        assert abs(counts[number] - expected) <= repeats * (len(data) / 2 + 1)


def test_weights_are_sizes_by_default_and_an_epoch_is_as_many_rows_as_samples() -> None:
    mixed = sampler(Sizes(300), Sizes(100))
    assert mixed.steps_per_epoch == pytest.approx(400 / 24)
    rows = [row for step in range(50) for row in batch(mixed, step)]
    assert Counter(row.dataset for row in rows) == {0: 900, 1: 300}
    assert {row.epoch for row in rows} <= {0, 1, 2, 3}
    assert "75.000% 0 (300 samples)" in mixed.summary()


def test_a_set_smaller_than_its_share_of_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'small' has 5 samples, and its weight gives it 12 of a batch of 24"):
        sampler(Sizes(100), Sizes(5), weights=(1, 1), names=("large", "small"))
    with pytest.raises(ValueError, match="more than 0"):
        sampler(Sizes(100), Sizes(50), weights=(1, 0))
    rare = sampler(Sizes(1000), Sizes(2), weights=(1000, 1))  # less than a row a batch
    assert Counter(row.dataset for step in range(100) for row in batch(rare, step))[1] in (2, 3)


def test_state_brings_the_sampler_back() -> None:
    data = Sizes(50, 30), Sizes(41)
    mixed = sampler(*data, weights=(1, 2.5), names=("a", "b"))
    state = json.loads(json.dumps(mixed.state()))
    again = Sampler.continued(state, dict(enumerate(data)))  # type: ignore[arg-type]
    assert again.state() == mixed.state() == state
    for step in (0, 3, 99):
        assert batch(again, step) == batch(mixed, step)
    assert again.steps_per_epoch == mixed.steps_per_epoch


@pytest.mark.parametrize("resumed_at", [1, 5, 6, 7, 11, 12])
def test_new_data_are_shown_from_the_next_pass_on(resumed_at: int) -> None:
    old, new = Sizes(100, 50), Sizes(100, 50, 70)
    before, after = sampler(old), sampler(new)  # 6 steps a pass, then 9
    grown = before.grown(after, resumed_at)
    boundary = -(-resumed_at // 6) * 6
    assert [segment.start_step for segment in grown.segments] == [0, boundary]
    for step in range(boundary):
        assert batch(grown, step) == batch(before, step)
    first = [row for step in range(boundary, boundary + 9) for row in batch(grown, step)]
    assert {row.dataset for row in first} == {1}
    assert {row.epoch for row in first} == {boundary // 6}
    assert len({row.sample for row in first}) == 216
    assert grown.steps_per_epoch == 6  # what the run's length and schedules were made from
    # killed and resumed at any step, with what was stored, and without the old shards once they are no longer shown
    state = json.loads(json.dumps(grown.state()))
    again = Sampler.continued(state, {0: old, 1: new})  # type: ignore[dict-item]
    later = Sampler.continued(state, {1: new})  # type: ignore[dict-item]
    for step in range(40):
        assert batch(again, step) == batch(grown, step)
        if step >= boundary:
            assert batch(later, step) == batch(grown, step)
    with pytest.raises(ValueError, match="earlier part of the run is not open"):
        batch(later, 0)


def test_data_grow_again_and_again() -> None:
    sizes = [Sizes(100, 50), Sizes(100, 50, 70), Sizes(100, 50, 70, 80)]
    shown = sampler(sizes[0]).grown(sampler(sizes[1]), 4).grown(sampler(sizes[2]), 8)
    assert [segment.start_step for segment in shown.segments] == [0, 6, 15]
    assert [segment.parts[0].first_pass for segment in shown.segments] == [0, 1, 2]
    # adopted a second time before the first was shown: that never happened
    shown = sampler(sizes[0]).grown(sampler(sizes[1]), 4).grown(sampler(sizes[2]), 5)
    assert [(s.start_step, s.parts[0].num_samples) for s in shown.segments] == [(0, 150), (6, 300)]
    shown = sampler(sizes[0]).grown(sampler(sizes[1]), 6).grown(sampler(sizes[2]), 6)
    assert [(s.start_step, s.parts[0].num_samples) for s in shown.segments] == [(0, 150), (6, 300)]


def test_one_of_two_sets_grows() -> None:
    old, other, new = Sizes(60), Sizes(90), Sizes(60, 30)
    before, after = sampler(old, other), sampler(new, other)
    grown = before.grown(after, 20)  # 6.25 steps an epoch
    assert [segment.start_step for segment in grown.segments] == [0, 25]
    assert [part.dataset for part in grown.segments[1].parts] == [2, 1]
    passes: dict[tuple[int, int], list[int]] = {}
    for step in range(60):
        for row in batch(grown, step):
            passes.setdefault((row.dataset, row.epoch), []).append(row.sample)
    for (dataset, _), samples in passes.items():
        assert len(set(samples)) == len(samples), dataset  # also at the change: a set that stays begins a new pass
    assert grown.segments[1].parts[0].weight == Fraction(90)
    assert np.all(np.diff(sorted({epoch for dataset, epoch in passes if dataset == 1})) == 1)
