"""Whether a run learns, and how fast: loss and rate over time, weights, averages, data and speed."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Moment, Rule
from pretrain.diagnostics.collapse import EARLY_STEPS
from pretrain.engines.schedules import Timeline
from pretrain.methods.registry import spec_of

MIN_STALLED_STEPS = 1000


def learning_rules(config: Config, timeline: Timeline, peak_rate: float, warmup_steps: int) -> list[Rule]:
    """The alarms of every method. peak_rate, warmup_steps: of the learning rate."""
    end = 0.95 * timeline.total_steps  # rate and momentum may come to their ends there
    rules: list[Rule] = [
        Limit(
            "rate_zero",
            "lr",
            1e-6 * peak_rate,
            high=False,
            says="the learning rate is {value:.1e} (its peak is "
            f"{peak_rate:.1e}) long before the end: nothing is learned. Look at optim.schedule and optim.step_epochs",
            since=lambda now: warmup_steps + 1 < now.step < end,
        ),
        Limit(
            "data_bound",
            "data_wait",
            0.2,
            high=True,
            says="{value:.0%} of the time goes into waiting for data (expected: under {limit:.0%}). Give each process "
            "more cores, data.workers or data.threads, take data.stage=true where the file system is slow, and see "
            "`selfsight data profile`",
            since=lambda now: now.step > 20,  # the first batches are always waited for
            slack=0.25,
            lines=3,
        ),
        Slow(),
        BadSamples(config.train.batch_size),
        Growth(),
        Limit(
            "teacher_is_student",
            "teacher_distance",
            1e-7,
            high=False,
            says="the slow average is the network itself (distance {value:.0e} of its norm): is its momentum 0? Raise "
            "method.teacher_momentum or method.average_momentum",
            since=lambda now: max(EARLY_STEPS, warmup_steps) < now.step < end,  # they begin as one
        ),
        TeacherStill(end),
    ]
    if spec_of(config.method).loss_falls:
        rules.append(Stalled(max(MIN_STALLED_STEPS, timeline.total_steps // 5)))
    return rules


@dataclass
class Stalled:
    """No new lowest loss for long; of each log line the mean over the last ten, which noise alone seldom breaks."""

    patience_steps: int
    name: str = "loss_stalled"
    lines: int = 1
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=10))
    _lowest: float = math.inf
    _at: int = 0

    def can_tell(self, now: Moment) -> bool:
        return math.isfinite(now.metrics["loss"])

    def trouble(self, now: Moment, standing: bool) -> str | None:
        self._recent.append(now.metrics["loss"])
        smooth = fmean(self._recent)
        if smooth < self._lowest * (1 - 1e-4) or math.isinf(self._lowest):
            self._lowest, self._at = smooth, now.step
        if now.step - self._at < self.patience_steps:
            return None
        return (
            f"loss is {smooth:.4f} and has not fallen below {self._lowest:.4f} since step {self._at} (expected: a new "
            f"lowest within {self.patience_steps} steps). Lower or raise optim.lr, or end the run"
        )


@dataclass
class Slow:
    """Images per second far below their own median over the last log lines."""

    name: str = "slow"
    lines: int = 3
    window: int = 50
    suspect: str = ""  # which rank seems to be the reason, in words
    _speeds: deque[float] = field(default_factory=deque)

    def can_tell(self, now: Moment) -> bool:
        return "images_per_second" in now.metrics and now.step > 20

    def trouble(self, now: Moment, standing: bool) -> str | None:
        speed = now.metrics["images_per_second"]
        usual = median(self._speeds) if len(self._speeds) >= 10 else None
        self._speeds.append(speed)
        if len(self._speeds) > self.window:
            self._speeds.popleft()
        if usual is None or speed > (0.8 if standing else 0.6) * usual:
            return None
        return (
            f"{speed:.0f} images/s (the median of the last {len(self._speeds)} log lines is {usual:.0f}). Is a node "
            f"throttled or shared, or the file system slow? See data_wait.{self.suspect}"
        )


@dataclass
class BadSamples:
    """The samples that can't be read since the last log line, against what their share before lets expect."""

    batch_size: int
    name: str = "bad_samples_rise"
    lines: int = 1
    _first: tuple[int, float] | None = None  # step, bad samples by then
    _before: tuple[int, float] | None = None

    def can_tell(self, now: Moment) -> bool:
        return "bad_samples" in now.metrics

    def trouble(self, now: Moment, standing: bool) -> str | None:
        first, before = self._first, self._before
        self._before = (now.step, now.metrics["bad_samples"])
        self._first = first or self._before
        # five times as long before as since, so that a few say nothing
        if first is None or before is None or not 0 < 5 * (now.step - before[0]) <= before[0] - first[0]:
            return None
        rows, new = (now.step - before[0]) * self.batch_size, now.metrics["bad_samples"] - before[1]
        old = (before[1] - first[1]) / ((before[0] - first[0]) * self.batch_size)
        expected = old * rows
        if new <= (2 if standing else 5) * expected + 3 * math.sqrt(expected) + (0 if standing else 5):
            return None
        return (
            f"{new:.0f} of the {rows} samples since step {before[0]} could not be read ({new / rows:.2%}; before it "
            f"was {old:.2%}). bad_samples/ of the run names them; was a shard cut, or does a disk fail?"
        )


@dataclass
class Growth:
    """The norm of all weights, against its first value since the start."""

    limit: float = 10.0
    name: str = "weights_grow"
    lines: int = 1
    _first: float | None = None

    def can_tell(self, now: Moment) -> bool:
        return "weight_norm" in now.metrics

    def trouble(self, now: Moment, standing: bool) -> str | None:
        norm = now.metrics["weight_norm"]
        self._first = self._first or norm
        if norm <= self.limit * self._first * (0.9 if standing else 1.0):
            return None
        return (
            f"the norm of all weights is {norm:.3g}, {norm / self._first:.0f} times what it was (expected: under "
            f"{self.limit:.0f} times). Lower optim.lr, or raise optim.weight_decay"
        )


@dataclass
class TeacherStill:
    """The slow average between two looks at it."""

    end: float  # step from which it may stand still
    name: str = "teacher_still"
    lines: int = 1
    _before: tuple[int, float] | None = None

    def can_tell(self, now: Moment) -> bool:
        return "teacher_sum" in now.metrics and now.step < self.end

    def trouble(self, now: Moment, standing: bool) -> str | None:
        before, self._before = self._before, (now.step, now.metrics["teacher_sum"])
        if before is None or before[0] == now.step or before[1] != now.metrics["teacher_sum"]:
            return None
        return (
            f"the slow average has not moved since step {before[0]}: is its momentum 1? Lower method.teacher_momentum "
            "or method.average_momentum"
        )
