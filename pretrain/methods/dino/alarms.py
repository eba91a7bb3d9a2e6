"""The ways in which what DINO learns becomes worthless."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Moment, Rule
from pretrain.diagnostics.collapse import Since, at_ln_k

#: What mended it on 1,650 images that hardly differ, where neither Sinkhorn centring nor KoLeo did.
ADVICE = (
    "If your images look much alike, the crops' colours hide what tells them apart: set jitter, grayscale, blur and "
    "solarise of views.global_crops and views.local_crops to 0 and let scale begin at .5 (as the preset "
    "dino_own_data does). Lower optim.lr or method.teacher_temperature if they are of many kinds"
)


@dataclass
class TeacherUniform:
    """A teacher that says the same of every image: at ln K, or on its way back there with the loss."""

    uniform: float  # ln K
    since: Since
    name: str = "teacher_uniform"
    lines: int = 1
    _lowest: float = math.inf

    def can_tell(self, now: Moment) -> bool:
        return "teacher_entropy" in now.metrics

    def trouble(self, now: Moment, standing: bool) -> str | None:
        entropy = now.metrics["teacher_entropy"]
        self._lowest = min(self._lowest, entropy)
        if not self.since(now):
            return None
        loss = now.metrics.get("dino", now.metrics["loss"])
        rose = min(entropy, loss) > 0.95 * self.uniform and entropy - self._lowest > 0.1 * self.uniform
        if not rose and entropy <= (0.98 if standing else 0.99) * self.uniform:
            return None
        return (
            f"teacher_entropy is {entropy:.2f}, that of no opinion (ln K = {self.uniform:.2f}): the teacher says the "
            f"same of every image, all prototypes alike (collapse to uniform). {ADVICE}"
        )


def alarms(config: Config, learner: Any, since: Since) -> list[Rule]:
    """What is watched beside the alarms of every method."""
    method = config.method
    uniform = math.log(int(method.prototypes))
    # of a run that is told apart by images, DINO's own loss: DINOv2's further terms count in `loss`
    several = method.ibot is not None or method.gram is not None or method.koleo_weight or method.sigreg_weight
    rules: list[Rule] = [
        at_ln_k("dino" if several else "loss", int(method.prototypes), "prototypes", ADVICE, since),
        TeacherUniform(uniform, since),
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
        chance = at_ln_k("ibot_of_masked", count, "prototypes of the patch tokens", ADVICE, since)
        rules.append(dataclasses.replace(chance, name="ibot_at_ln_k", derive=of_masked))
    return rules


def _sharpest(metrics: Mapping[str, float]) -> float | None:
    """The higher of the teacher's entropy and DINO's loss: near zero where one prototype takes all."""
    if "teacher_entropy" not in metrics:
        return None
    return max(metrics["teacher_entropy"], metrics.get("dino", metrics["loss"]))
