"""The ways in which what LeJEPA learns becomes worthless."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Rule
from pretrain.diagnostics.collapse import Since


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    return [
        Limit(
            "cloud_at_a_point",
            "sigreg",
            0.9 * learner.statistic_of_a_point(),
            high=True,
            says="sigreg is above {limit:.3g}, nearly that of embeddings that are all the same: SIGReg no longer holds "
            "the views' agreement back. Raise method.weight (.05, say) or lower optim.lr",
            since=since,
        )
    ]
