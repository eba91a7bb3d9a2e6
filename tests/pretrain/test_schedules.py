from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pretrain.config import OptimConfig, TrainConfig
from pretrain.engines.schedules import Cosine, Staircase, Steps, Timeline, learning_rate, weight_decay


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


def test_a_constant_rate_stays_at_its_peak() -> None:
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup_epochs=2)
    rate = learning_rate(optim, 512, Timeline(100, 10.0))
    assert [rate(step) for step in (0, 10, 20, 60, 99)] == pytest.approx([0, 1e-3, 2e-3, 2e-3, 2e-3])


def test_decay_is_constant_unless_an_end_is_set() -> None:
    timeline = Timeline(100, 10.0)
    assert weight_decay(OptimConfig(lr=1.0, weight_decay=0.05), timeline)(73) == 0.05
    rising = weight_decay(OptimConfig(lr=1.0, weight_decay=0.04, weight_decay_end=0.4), timeline)
    assert (rising(0), rising(100)) == (pytest.approx(0.04), pytest.approx(0.4))


def test_a_run_has_a_step_at_least() -> None:
    assert Timeline.of(TrainConfig(epochs=0.001, batch_size=8), 10.0).total_steps == 1
    assert Timeline.of(TrainConfig(steps=7, batch_size=8), 10.0).epoch(5) == 0.5


def test_lengths_may_be_fractions() -> None:
    """A length is the nearest whole step, halves later, and a run has one at least."""
    cases = ((0.5, 15.0, 8), (0.25, 10.0, 3), (1.5, 312.0, 468), (0.1, 8.75, 1), (2, 8.75, 18), (0.001, 10.0, 1))
    for epochs, steps_per_epoch, expected in cases:
        assert Timeline.of(TrainConfig(epochs=epochs, batch_size=8), steps_per_epoch).total_steps == expected
    for steps, expected in ((1500.0, 1500), ("1.5e3", 1500), (2.5, 3), (0.2, 1), (7, 7)):
        assert Timeline.of(TrainConfig(steps=steps, batch_size=8), 10.0).total_steps == expected
    assert Timeline(100, 8.75).steps(0.4) == 4  # 3.5


@pytest.mark.parametrize(("every", "steps_per_epoch"), [(0.25, 10.0), (0.3, 8.75), (1, 8.75), (2, 15.0), (1.5, 7.3)])
def test_periods_of_a_fraction_of_an_epoch_add_up(every: float, steps_per_epoch: float) -> None:
    """Each multiple is rounded by itself: the hundredth comes when a hundred are over."""
    timeline = Timeline(10**6, steps_per_epoch)
    last = math.ceil(100 * every * steps_per_epoch) + 1
    due = [step for step in range(last + 1) if timeline.is_due(step, every)]
    expected = [math.floor(multiple * every * steps_per_epoch + 0.5) for multiple in range(1, 101)]
    assert [step for step in due if step <= expected[-1]] == expected


def test_what_is_never_due_and_what_always() -> None:
    timeline = Timeline(100, 8.75)
    assert not any(timeline.is_due(step, None) for step in range(50))
    assert not timeline.is_due(0, 1.0)
    assert all(timeline.is_due(step, 0.01) for step in range(1, 50))


def test_the_root_rule_is_dinov2s() -> None:
    optim = OptimConfig(lr=4e-3, lr_reference_batch=1024, lr_scaling="sqrt")
    timeline = Timeline(100, 10.0)
    assert learning_rate(optim, 2048, timeline).peak == pytest.approx(4e-3 * math.sqrt(2))
    assert learning_rate(optim, 1024, timeline).peak == pytest.approx(4e-3)
    assert learning_rate(optim, 256, timeline).peak == pytest.approx(2e-3)


def test_steps_are_simmims_schedule() -> None:
    """SimMIM's ViT-B: a linear warm-up from a rate of its own, then the rate times .1 at each milestone."""
    per_epoch, epochs, batch = 5, 16, 1024
    optim = OptimConfig(
        lr=1e-4, lr_reference_batch=512, warmup_epochs=2, warmup_start=1e-6, schedule="steps", step_epochs=(7, 14)
    )
    rate = learning_rate(optim, batch, Timeline(per_epoch * epochs, per_epoch))
    assert isinstance(rate, Steps)
    expected = 2e-4
    for step in range(per_epoch * epochs):
        if step in (7 * per_epoch, 14 * per_epoch):
            expected *= 0.1
        warmed = 1e-6 + (2e-4 - 1e-6) * step / 10
        assert rate(step) == pytest.approx(warmed if step < 10 else expected, rel=1e-12)
    assert rate(10**6) == pytest.approx(2e-6)


@pytest.mark.parametrize("schedule", [{}, {"schedule": "steps", "step_epochs": (5,)}])
@pytest.mark.parametrize("warmup", ["linear", "linear_inclusive"])
def test_a_warmup_starts_where_it_is_told(schedule: dict[str, Any], warmup: str) -> None:
    optim = OptimConfig(lr=1.0, warmup_epochs=2, warmup_start=0.25, warmup=warmup, **schedule)
    rate = learning_rate(optim, 256, Timeline(100, 10.0))
    expected = np.linspace(0.25, 1.0, 20) if warmup == "linear_inclusive" else np.linspace(0.25, 1.0, 21)[:-1]
    assert [rate(step) for step in range(20)] == pytest.approx(expected.tolist())
    assert rate(20) == 1.0
