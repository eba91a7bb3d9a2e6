"""The alarm of a run that makes released weights worse."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.diagnostics.alarms import Moment
from pretrain.tracking.course import Course


@dataclass
class WorseThanStart:
    """The alarm; with `diagnostics.stop_on`, it ends a run when it begins: after two measurements in a row."""

    course: Course
    name: str = "worse_than_start"
    lines: int = 2
    patience: int = 1

    def can_tell(self, now: Moment) -> bool:
        return now.step > 0 and self.course.judge in now.metrics

    def trouble(self, now: Moment, standing: bool) -> str | None:
        if not self.course.is_worse:
            return None
        return (
            f"{self.course.words()}. What was brought is being lost: lower optim.lr, hold it "
            "(continuing.feature_weight, gram_weight), or train less of it (continuing.lora, train_blocks)"
        )
