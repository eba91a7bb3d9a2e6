"""Everything that changes with time, as pure functions of the step (imports no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.schema import OptimConfig, TrainConfig


@dataclass(frozen=True)
class Timeline:
    """How long a run is, in optimizer steps and in passes over the data."""

    total_steps: int
    steps_per_epoch: float

    @classmethod
    def of(cls, train: TrainConfig, steps_per_epoch: float) -> Timeline:
        """The run that `train` asks for, of at least one step."""
        if train.steps is not None:
            return cls(train.steps, steps_per_epoch)
        assert train.epochs is not None
        return cls(max(1, round(train.epochs * steps_per_epoch)), steps_per_epoch)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs."""
        return round(epochs * self.steps_per_epoch)

    def epoch(self, step: int) -> float:
        """Passes over the data before `step`."""
        return step / self.steps_per_epoch


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
            last = self.warmup_steps - 1 if self.inclusive else self.warmup_steps
            return self.start + (self.peak - self.start) * (step / last if last else 1.0)
        length = self.total_steps - self.warmup_steps
        share = min(1.0, (step - self.warmup_steps) / length) if length else 1.0
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * share))


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


def learning_rate(optim: OptimConfig, batch_size: int, timeline: Timeline) -> Cosine:
    """The learning rate, scaled linearly with the global batch."""
    return Cosine(
        peak=optim.lr * batch_size / optim.lr_reference_batch,
        end=optim.lr_end,
        total_steps=timeline.total_steps,
        warmup_steps=timeline.steps(optim.warmup_epochs),
        inclusive=optim.warmup == "linear_inclusive",
    )


def weight_decay(optim: OptimConfig, timeline: Timeline) -> Cosine:
    """Weight decay, constant unless `weight_decay_end` is set."""
    end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
    return Cosine(peak=optim.weight_decay, end=end, total_steps=timeline.total_steps)
