"""Everything that changes with time, as pure functions of the step (imports no torch)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from pretrain.config import OptimConfig, TrainConfig
from pretrain.config.load import ConfigError

#: From an optimizer step (from 0) to the value it uses.
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Timeline:
    """How long a run is, in optimizer steps and in epochs, of which each may be a fraction.

    What is given in epochs takes effect at the nearest whole step, halves later; each multiple of a period is rounded
    by itself, so that no error adds up. A run has one step at least. An epoch is what `Sampler.steps_per_epoch` says:
    a pass over a single data set, whose last N mod B samples wait for the next one; N / B steps of several.
    """

    total_steps: int
    steps_per_epoch: float

    @classmethod
    def of(cls, train: TrainConfig, steps_per_epoch: float) -> Timeline:
        """The run that `train` asks for, of at least one step."""
        if train.steps is not None:
            return cls(max(1, _nearest(train.steps)), steps_per_epoch)
        assert train.epochs is not None
        return cls(max(1, _nearest(train.epochs * steps_per_epoch)), steps_per_epoch)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs."""
        return _nearest(epochs * self.steps_per_epoch)

    def is_due(self, step: int, every_epochs: float | None) -> bool:
        """Whether `step` steps are a multiple of so many epochs; of a period below a step, each is. None: never."""
        if every_epochs is None or step < 1:
            return False
        multiple = _nearest(step / (every_epochs * self.steps_per_epoch))
        return self.steps(every_epochs) < 1 or any(
            self.steps(every_epochs * near) == step for near in (multiple - 1, multiple, multiple + 1) if near > 0
        )

    def epoch(self, step: int) -> float:
        """Passes over the data before `step`."""
        return step / self.steps_per_epoch


def _nearest(steps: float) -> int:
    return math.floor(steps + 0.5)


@dataclass(frozen=True)
class Cosine:
    """A linear warm-up from `start` to `peak`, then half a cosine to `end` over the remaining steps.

    At step s of w warm-up steps the value is s / w of the way up (MAE), or s / (w - 1) of it when `inclusive`
    (numpy's linspace, as in DINO and BEiT). The step after the last has the value `end`.
    """

    peak: float
    end: float
    total_steps: int
    warmup_steps: int = 0
    start: float = 0.0
    inclusive: bool = False

    def __call__(self, step: int) -> float:
        """The value that optimizer step `step` (from 0) uses."""
        if step < self.warmup_steps:
            return _warmup(step, self.start, self.peak, self.warmup_steps, self.inclusive)
        length = self.total_steps - self.warmup_steps
        share = min(1.0, (step - self.warmup_steps) / length) if length else 1.0
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Steps:
    """A linear warm-up as `Cosine`'s, then `peak`, multiplied by `factor` at each of the `milestones` (SimMIM)."""

    peak: float
    factor: float
    milestones: tuple[int, ...]  # optimizer steps, ascending
    warmup_steps: int = 0
    start: float = 0.0
    inclusive: bool = False

    def __call__(self, step: int) -> float:
        """The value that optimizer step `step` (from 0) uses."""
        if step < self.warmup_steps:
            return _warmup(step, self.start, self.peak, self.warmup_steps, self.inclusive)
        return self.peak * self.factor ** bisect_right(self.milestones, step)


def _warmup(step: int, start: float, peak: float, steps: int, inclusive: bool) -> float:
    last = steps - 1 if inclusive else steps
    return start + (peak - start) * (step / last if last else 1.0)


@dataclass(frozen=True)
class Staircase:
    """From `start` to `end` in equal stairs, one an epoch, over `epochs` epochs; then `end` (DINO's temperature)."""

    start: float
    end: float
    epochs: int
    steps_per_epoch: float

    def __call__(self, step: int) -> float:
        """The value that optimizer step `step` (from 0) uses."""
        epoch = int(step / self.steps_per_epoch)
        if epoch >= self.epochs:
            return self.end
        return self.start + (self.end - self.start) * (epoch / (self.epochs - 1) if self.epochs > 1 else 0.0)


def check_warmup(optim: OptimConfig, timeline: Timeline) -> None:
    """Refuse a warm-up that is longer than the run."""
    warmup = timeline.steps(optim.warmup_epochs)
    if warmup > timeline.total_steps:
        raise ConfigError(
            f"optim.warmup_epochs {optim.warmup_epochs:g} is {warmup} steps, more than the {timeline.total_steps} of "
            "the run; the rate would never reach its peak. Set it along, such as optim.warmup_epochs=0"
        )


def learning_rate(optim: OptimConfig, batch_size: int, timeline: Timeline) -> Cosine | Steps:
    """The learning rate, its peak scaled with the global batch: linearly (Goyal et al. 2017), or with its root."""
    share = batch_size / optim.lr_reference_batch
    peak = optim.lr * (math.sqrt(share) if optim.lr_scaling == "sqrt" else share)
    warmup_steps, inclusive = timeline.steps(optim.warmup_epochs), optim.warmup == "linear_inclusive"
    if optim.schedule == "steps":
        milestones = tuple(timeline.steps(epoch) for epoch in optim.step_epochs)
        return Steps(peak, optim.step_factor, milestones, warmup_steps, optim.warmup_start, inclusive)
    end = peak if optim.schedule == "constant" else optim.lr_end
    return Cosine(peak, end, timeline.total_steps, warmup_steps, optim.warmup_start, inclusive)


def weight_decay(optim: OptimConfig, timeline: Timeline) -> Cosine:
    """Weight decay, constant unless `weight_decay_end` is set."""
    end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
    return Cosine(peak=optim.weight_decay, end=end, total_steps=timeline.total_steps)
