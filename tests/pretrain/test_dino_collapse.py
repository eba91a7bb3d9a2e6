"""Collapse of DINO to uniform is told while it happens, with what mended it; healthy curves raise no alarm."""

from __future__ import annotations

import math

import pytest

from pretrain.config.load import load_config
from pretrain.diagnostics.alarms import Moment
from pretrain.diagnostics.collapse import collapse_rules
from pretrain.engines.schedules import Timeline
from pretrain.methods.dino.alarms import TeacherUniform

UNIFORM = math.log(1024)
#: Steps, and shares of ln K of teacher_entropy and loss, of runs on 1,650 images of one texture.
COLLAPSED = ((5, 0.35, 0.82), (25, 0.24, 0.52), (50, 0.52, 0.57), (100, 0.96, 0.96), (150, 0.99, 0.99), (200, 1.0, 1.0))
SINKHORN = ((5, 0.80, 1.04), (25, 0.85, 1.03), (50, 0.95, 1.00), (100, 0.99, 1.0), (150, 0.994, 1.0))
KOLEO = ((5, 0.35, 0.82), (25, 0.29, 0.62), (50, 0.52, 0.64), (100, 0.91, 0.95), (150, 0.955, 0.99), (200, 0.97, 1.0))
PLAIN = ((5, 0.45, 0.78), (25, 0.45, 0.60), (50, 0.04, 0.11), (100, 0.37, 0.44), (150, 0.40, 0.47), (200, 0.32, 0.38))
PLAIN_SINKHORN = ((5, 0.82, 1.03), (25, 0.81, 0.98), (50, 0.87, 0.96), (100, 0.88, 0.95), (200, 0.87, 0.93))


@pytest.mark.parametrize(
    ("curve", "told_at"), [(COLLAPSED, 100), (SINKHORN, 100), (KOLEO, 150), (PLAIN, None), (PLAIN_SINKHORN, None)]
)
def test_the_alarm_comes_while_the_teacher_goes_to_uniform(
    curve: tuple[tuple[int, float, float], ...], told_at: int | None
) -> None:
    rule = TeacherUniform(UNIFORM, since=lambda now: now.step >= 50)
    told = None
    for step, entropy, loss in curve:
        metrics = {"teacher_entropy": entropy * UNIFORM, "loss": loss * UNIFORM}
        text = rule.trouble(Moment(step, 0.0, metrics), standing=told is not None)
        if text is not None and told is None:
            told = step
            assert "set jitter, grayscale, blur and solarise" in text
    assert told == told_at


def test_a_long_warm_up_delays_no_alarm_of_dino() -> None:
    """Of 550 steps, 25 an epoch, with 10 epochs of warm-up: from step 50 on, not from 130."""
    config = load_config("dino_own_data", ["data.train=x", "method.prototypes=1024"])
    rule = next(r for r in collapse_rules(config, Timeline(550, 25.0)) if isinstance(r, TeacherUniform))
    assert [step for step in (49, 50, 130) if rule.since(Moment(step, 0.0, {}))] == [50, 130]


def test_ones_own_data_are_shown_without_operations_on_colours() -> None:
    views = load_config("dino_own_data", ["data.train=x"]).views
    assert views.local_crops is not None
    for crop in (*views.global_crops, views.local_crops):
        assert (crop.jitter, crop.grayscale, crop.blur, crop.solarise) == ((0, 0, 0, 0), 0, 0, 0)
    assert [crop.scale for crop in views.global_crops] == [(0.5, 1.0)] * 2
    assert views.local_crops.scale == (0.15, 0.5)
