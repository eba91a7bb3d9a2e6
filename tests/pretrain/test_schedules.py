from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.schedules import Cosine, Staircase, Timeline, learning_rate, weight_decay
from pretrain.schema import OptimConfig, TrainConfig


def test_inclusive_warmup_is_dinos_schedule() -> None:
    """The paper's code: linspace over the warm-up, then half a cosine over what remains."""
    base, end, total, warmup = 5e-4, 1e-6, 50, 10
    steps = np.arange(total - warmup)
    expected = np.concatenate(
        [np.linspace(0, base, warmup), end + 0.5 * (base - end) * (1 + np.cos(np.pi * steps / len(steps)))]
    )
    ours = Cosine(base, end, total, warmup, inclusive=True)
    assert [ours(step) for step in range(total)] == pytest.approx(expected.tolist(), abs=1e-15)


def test_linear_warmup_is_maes_schedule() -> None:
    """Per iteration: base * epoch / warm-up epochs, then half a cosine to 0."""
    per_epoch, epochs, warmup, base = 8, 10, 2, 2.4e-3
    ours = Cosine(base, 0.0, per_epoch * epochs, per_epoch * warmup)
    for step in range(per_epoch * epochs):
        epoch = step / per_epoch
        if epoch < warmup:
            expected = base * epoch / warmup
        else:
            expected = base * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        assert ours(step) == pytest.approx(expected, abs=1e-12)


def test_ends_are_exact() -> None:
    schedule = Cosine(1.0, 0.25, total_steps=10, warmup_steps=4)
    assert (schedule(0), schedule(4), schedule(10), schedule(99)) == (0.0, 1.0, 0.25, 0.25)
    assert Cosine(1.0, 0.0, total_steps=3, warmup_steps=3)(3) == 0.0
    assert Cosine(1.0, 0.0, total_steps=2, warmup_steps=1, inclusive=True)(0) == 1.0


def test_temperature_rises_once_an_epoch() -> None:
    stairs = Staircase(0.04, 0.07, epochs=4, steps_per_epoch=5.0)
    expected = [*np.linspace(0.04, 0.07, 4).repeat(5), 0.07, 0.07]
    assert [stairs(step) for step in range(22)] == pytest.approx(expected)
    assert Staircase(0.04, 0.07, epochs=0, steps_per_epoch=5.0)(0) == 0.07
    assert Staircase(0.04, 0.07, epochs=1, steps_per_epoch=5.0)(0) == 0.04


def test_the_rate_scales_with_the_global_batch() -> None:
    timeline = Timeline.of(TrainConfig(epochs=100, batch_size=4096), steps_per_epoch=312.0)
    optim = OptimConfig(lr=1.5e-4, warmup_epochs=40)
    rate = learning_rate(optim, 4096, timeline)
    assert (timeline.total_steps, rate.warmup_steps) == (31200, 12480)
    assert max(rate(step) for step in range(timeline.total_steps)) == pytest.approx(2.4e-3)


def test_decay_is_constant_unless_an_end_is_set() -> None:
    timeline = Timeline(100, 10.0)
    assert weight_decay(OptimConfig(lr=1.0, weight_decay=0.05), timeline)(73) == 0.05
    rising = weight_decay(OptimConfig(lr=1.0, weight_decay=0.04, weight_decay_end=0.4), timeline)
    assert (rising(0), rising(100)) == (pytest.approx(0.04), pytest.approx(0.4))


def test_a_run_has_a_step_at_least() -> None:
    assert Timeline.of(TrainConfig(epochs=0.001, batch_size=8), 10.0).total_steps == 1
    assert Timeline.of(TrainConfig(steps=7, batch_size=8), 10.0).epoch(5) == 0.5
