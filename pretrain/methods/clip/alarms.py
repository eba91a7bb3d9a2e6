"""The ways in which image-text contrast becomes worthless."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Rule
from pretrain.diagnostics.collapse import Since, at_ln_k
from pretrain.methods.clip.method import MOST_SCALE


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    rules: list[Rule] = [
        Limit(
            "temperature_at_limit",
            "logit_scale",
            0.995 * MOST_SCALE,
            high=True,
            says=f"logit_scale is {{value:.1f}}, at its limit of {MOST_SCALE:g}: cosines can't be told apart further. "
            "Lower optim.lr; are many captions the same, or images twice in the data (selfsight data dedupe)?",
            since=since,
            slack=0.01,
            lines=3,
        )
    ]
    if config.method.loss == "infonce":
        advice = "Do captions belong to their images? Raise or lower optim.lr, or raise train.batch_size"
        rules.append(at_ln_k("loss", config.train.batch_size, "global batch", advice, since))
    return rules
