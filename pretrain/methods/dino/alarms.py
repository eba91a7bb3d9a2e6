"""The ways in which what DINO learns becomes worthless."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Rule
from pretrain.diagnostics.collapse import Since, at_ln_k


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    method = config.method
    uniform = math.log(int(method.prototypes))
    # of a run that is told apart by images, DINO's own loss: DINOv2's further terms count in `loss`
    several = method.ibot is not None or method.koleo_weight
    advice = "Lower method.teacher_temperature or optim.lr, or lengthen optim.warmup_epochs"
    rules: list[Rule] = [
        at_ln_k("dino" if several else "loss", int(method.prototypes), "prototypes", advice, since),
        Limit(
            "teacher_uniform",
            "teacher_entropy",
            0.99 * uniform,
            high=True,
            says=f"teacher_entropy is {{value:.2f}}, that of no opinion (ln K = {uniform:.2f}): the teacher says the "
            "same of every image, all prototypes alike (collapse to uniform). Lower method.teacher_temperature",
            since=since,
            slack=0.01,
        ),
        Limit(
            "teacher_one_prototype",
            "one_prototype",
            0.01 * uniform,
            high=False,
            says="teacher_entropy and loss are both below {limit:.3f}: the teacher gives every image the same "
            "prototype (collapse to one). Raise method.teacher_temperature or lower method.center_momentum",
            since=since,
            derive=_sharpest,
        ),
    ]
    if method.ibot is not None:
        own, share = (method.ibot.prototypes if method.ibot.separate_head else None), method.ibot.masked_share

        def of_masked(metrics: Mapping[str, float]) -> float | None:
            return metrics["ibot"] / share if "ibot" in metrics else None  # crops without masks count zero

        count = int(own or method.prototypes)
        chance = at_ln_k("ibot_of_masked", count, "prototypes of the patch tokens", advice, since)
        rules.append(dataclasses.replace(chance, derive=of_masked))
    return rules


def _sharpest(metrics: Mapping[str, float]) -> float | None:
    """The higher of the teacher's entropy and DINO's loss: near zero where one prototype takes all."""
    if "teacher_entropy" not in metrics:
        return None
    return max(metrics["teacher_entropy"], metrics.get("dino", metrics["loss"]))
