"""The order contract: all different, all seen, mixed, and a function of its arguments alone."""

from __future__ import annotations

import time

import numpy as np
import pytest

from data_pipelines.order import Order, default_lanes
from data_pipelines.rng import Stream, mix, random_bits, stream_key, stream_keys, uniform_table

RAGGED = (700, 1, 0, 333, 1024, 5, 90)


def one_pass(order: Order, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_pass
    return np.concatenate([order.ids(step) for step in range(first, first + order.steps_per_pass)])


@pytest.mark.parametrize("lanes", [None, 1, 4, 32])
@pytest.mark.parametrize("window", [1, 7, 64, 1024])
def test_a_pass_shows_different_samples_and_leaves_out_fewer_than_a_batch(lanes: int | None, window: int) -> None:
    order = Order(5, RAGGED, batch_size=32, lanes=lanes, window=window)
    for epoch in (0, 1, 2, 40):
        shown = one_pass(order, epoch)
        assert len(np.unique(shown)) == len(shown) == sum(RAGGED) // 32 * 32
        assert shown.min() >= 0
        assert shown.max() < sum(RAGGED)


def test_what_one_pass_leaves_out_the_next_one_shows() -> None:
    order = Order(0, (100, 100, 51), batch_size=64)  # 59 of 251 left out
    everything = set(range(251))
    for epoch in range(12):
        left_out = everything - set(one_pass(order, epoch).tolist())
        assert len(left_out) == 59
        assert left_out <= set(one_pass(order, epoch + 1).tolist())


def test_passes_and_seeds_differ_and_repeat_exactly() -> None:
    order = Order(1, RAGGED, batch_size=64)
    assert not np.array_equal(one_pass(order, 0), one_pass(order, 1))
    assert not np.array_equal(one_pass(order, 0), one_pass(Order(2, RAGGED, batch_size=64), 0))
    again = Order(1, RAGGED, batch_size=64)
    for step in (77, 3, 500, 78, 0):  # in any order: nothing is carried from step to step
        np.testing.assert_array_equal(order.ids(step), again.ids(step))


def test_the_order_is_pinned() -> None:
    """A run of today resumes under the release of tomorrow, so these numbers never change."""
    order = Order(3, (10, 6, 9), batch_size=4, lanes=2, window=3)
    assert [order.ids(step).tolist() for step in (0, 5, 6, 1000)] == [
        [15, 13, 1, 2],
        [23, 24, 11, 12],
        [4, 3, 21, 22],
        [5, 10, 20, 21],
    ]


def test_rows_are_ordered_by_lane() -> None:
    order = Order(0, (4096,), batch_size=16, lanes=4, window=16)
    lanes = [np.concatenate([order.ids(step)[4 * lane : 4 * lane + 4] for step in range(256)]) for lane in range(4)]
    for lane in lanes:  # a run of the axis (which may wrap round), 16 samples shuffled at a time
        for window in lane.reshape(-1, 16):
            runs = np.diff(np.sort(window))
            assert (runs > 1).sum() <= 1


def test_class_sorted_shards_are_mixed() -> None:
    """100 classes of 200, sorted: a batch must look like a draw from the whole, not like a piece of it."""
    labels = np.repeat(np.arange(100), 200)
    order = Order(0, [1000] * 20, batch_size=256, window=256)
    classes = [len(np.unique(labels[order.ids(step)])) for step in range(order.steps_per_pass)]
    ideal = 100 * (1 - 0.99**256)
    assert np.mean(classes) > 0.9 * ideal


def test_a_step_costs_no_more_in_a_thousand_times_the_data() -> None:
    def seconds(order: Order) -> float:
        order.ids(0)
        began = time.perf_counter()
        for step in range(1, 200):
            order.ids(step)
        return time.perf_counter() - began

    small, large = (Order(0, [1000] * shards, batch_size=64, lanes=64, window=256) for shards in (100, 100_000))
    assert min(seconds(large) for _ in range(3)) < 5 * min(seconds(small) for _ in range(3))


def test_default_lanes() -> None:
    assert default_lanes(1_281_167, 4096) == 512
    assert default_lanes(1_281_167, 1000) == 500
    assert default_lanes(20_000, 256) == 16  # 20 lanes would still fill a window of 1024 each
    assert default_lanes(640, 128) == 1  # shuffled as a whole


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"batch size is 65 .* 64 samples"):
        Order(0, (64,), batch_size=65)
    with pytest.raises(ValueError, match=r"nearest choices are 3, 4, 6"):
        Order(0, (64,), batch_size=24, lanes=5)
    with pytest.raises(ValueError, match=r"step is -1"):
        Order(0, (64,), batch_size=8).ids(-1)


def test_splitmix_is_the_published_one() -> None:
    """The first numbers of seed 1234567, as in the authors' reference program."""
    gamma = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + i * gamma) % 2**64) for i in (1, 2, 3)] == expected
    assert random_bits(1234567, 3).tolist() == expected


def test_a_stream_is_the_array_one_at_a_time() -> None:
    stream = Stream(4, 2)
    assert [stream.bits() for _ in range(5)] == random_bits(stream_key(4, 2), 5).tolist()
    assert stream_key(4, 2) not in (stream_key(2, 4), stream_key(4, 2, 0), stream_key(6))


def test_many_streams_at_once_are_those_of_one_at_a_time() -> None:
    rows, crops = np.arange(3, 6), np.arange(2)[:, None]
    keys = stream_keys(7, 8, crops, rows)
    assert keys.shape == (2, 3)
    assert keys.tolist() == [[stream_key(7, 8, crop, row) for row in range(3, 6)] for crop in range(2)]
    table = uniform_table(keys.reshape(-1), 4)
    streams = [Stream(7, 8, crop, row) for crop in range(2) for row in range(3, 6)]
    assert table.tolist() == [[stream.random() for _ in range(4)] for stream in streams]


def test_a_stream_is_uniform() -> None:
    draws = np.array([Stream(seed, word).random() for seed in range(100) for word in range(100)])
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = .001


def test_some_places_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    whole = Order(5, [300, 200, 524], 64, lanes=8, window=20)
    for step in (0, 3, 15, 16, 200):
        places = rng.choice(64, 9)
        part = Order(5, [300, 200, 524], 64, lanes=8, window=20)
        assert part.ids(step, places).tolist() == whole.ids(step)[places].tolist()
        assert part.ids(step, places[:0]).tolist() == []
