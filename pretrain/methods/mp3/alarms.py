"""The ways in which what MP3 learns becomes worthless."""

from __future__ import annotations

import math
from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Rule
from pretrain.diagnostics.collapse import Since


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    return [
        Limit(
            "positions_guessed",
            "loss",
            0.995 * math.log(learner.num_positions),
            high=True,
            says="the loss is above {limit:.4g}, that of guessing positions: nothing is learned. Lower optim.lr or "
            "method.unseen_ratio, or warm up for longer",
            since=since,
        )
    ]
