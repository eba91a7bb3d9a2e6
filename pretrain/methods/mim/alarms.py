"""The ways in which what masked image modelling learns becomes worthless."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Rule
from pretrain.diagnostics.collapse import Since, at_ln_k, at_mean, nothing_to_predict


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    rules: list[Rule] = [nothing_to_predict(since)]
    if config.method.target == "codes":
        count = learner.target.num_outputs
        rules.append(at_ln_k("loss", count, f"codes ({count})", "Lower or raise optim.lr", since))
    return rules + ([at_mean(since)] if config.method.target == "normalised_pixels" else [])
