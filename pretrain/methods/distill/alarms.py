"""The ways in which what is distilled becomes worthless."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Rule
from pretrain.diagnostics.collapse import Since


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    return [
        Limit(
            "teacher_says_one_thing",
            "teacher_std",
            0.05,
            high=False,
            says="teacher_std is {value:.3f} (1: the teacher's features of different images spread evenly; under "
            "{limit}: they are all but the same): there is nothing to learn from it. Is method.teacher trained, and on "
            "images such as these? `selfsight probe` of it tells",
            since=since,
        )
    ]
