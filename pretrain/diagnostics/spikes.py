"""Steps whose loss or gradient lies far above what it was."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from data_pipelines.wording import counted
from pretrain.diagnostics.alarms import Moment

MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass
class Spikes:
    """Counts a value's spikes: above its running median by `deviations` robust standard deviations, and `ratio` times.

    The median and the median absolute deviation (MAD) are those of the last `window` values. Healthy runs
    have one now and then: the alarm is for one of `alone` times the median, or for `several` within `calm` steps, and
    stands until `calm` steps have passed without either. A value counts as `most` where it is more: what is clipped
    there does no harm.
    """

    name: str
    what: str
    advice: str
    ratio: float
    alone: float
    several: int = 5
    deviations: float = 10.0
    window: int = 200
    calm: int = 100
    most: float = math.inf
    lines: int = 1
    count: int = 0
    _values: deque[float] = field(default_factory=deque)
    _recent: deque[int] = field(init=False)  # steps of the last spikes
    _last: tuple[int, float, float] | None = None  # step, value, the median then

    def __post_init__(self) -> None:
        self._recent = deque(maxlen=self.several)

    def add(self, step: int, value: float | None) -> None:
        """The value of a finished step; those that are not finite are another alarm's."""
        if value is None or not math.isfinite(value):
            return
        value = min(value, self.most)
        if len(self._values) >= min(20, self.window):
            middle = median(self._values)
            mad = median(abs(each - middle) for each in self._values)
            if value > self.ratio * abs(middle) and value > middle + self.deviations * MAD_TO_DEVIATION * mad:
                self.count += 1
                self._recent.append(step)
                together = len(self._recent) == self.several and step - self._recent[0] < self.calm
                if together or value > self.alone * abs(middle):
                    self._last = (step, value, middle)
        self._values.append(value)
        if len(self._values) > self.window:
            self._values.popleft()

    def can_tell(self, now: Moment) -> bool:
        return True

    def trouble(self, now: Moment, standing: bool) -> str | None:
        if self._last is None or now.step - self._last[0] >= self.calm:
            return None
        step, value, middle = self._last
        return (
            f"{self.what} was {value:.3g} in step {step} (expected: about its median of {middle:.3g}); "
            f"{counted(self.count, 'such step')} since the start. {self.advice}"
        )


def gradient_spikes(clip: float = 0.0) -> Spikes:
    """Of the gradients' global norm as the optimizer sees it: clipped to `clip`, unless that is 0."""
    advice = "Lower optim.lr, lengthen optim.warmup_epochs, or set optim.clip_grad to some times the median"
    return Spikes("gradient_spikes", "the gradient norm", advice, ratio=4.0, alone=10.0, most=clip or math.inf)


def loss_spikes() -> Spikes:
    """Of the loss."""
    return Spikes("loss_spikes", "the loss", "Lower optim.lr, or set optim.clip_grad", ratio=1.25, alone=2.0)
