"""The ways in which what the dVAE learns becomes worthless."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Rule
from pretrain.diagnostics.collapse import Since, dead_codes


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    return [dead_codes("Lower method.kl_weight or method.vocab_size, or set method.start=spread")]
