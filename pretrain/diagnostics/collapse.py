"""The ways in which what is learned becomes worthless: collapse, trivial targets, a vocabulary that dies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pretrain.config import Config, DinoConfig, DvaeConfig, MaeConfig, MimConfig, VqkdConfig
from pretrain.diagnostics.alarms import Limit, Moment, Rule
from pretrain.engines.schedules import Timeline

EARLY_STEPS = 50  # of which nothing can be told yet
Since = Callable[[Moment], bool]


def collapse_rules(config: Config, timeline: Timeline, vocab_size: int | None = None) -> list[Rule]:
    """The alarms that a run's method can give. `vocab_size`: codes of the tokenizer, where codes are predicted.

    Early steps are spared: every DINO run starts at ln K, and every reconstruction at the mean.
    """
    method = config.method
    # DINO shows within tens of steps after its prototypes thaw, at however low a rate
    own = method.freeze_last_layer_epochs if isinstance(method, DinoConfig) else config.optim.warmup_epochs / 2
    start = max(1.0, own)
    # never beyond the first third of a run, whose warm-up may be most of it
    first = max(EARLY_STEPS, min(timeline.steps(start), timeline.total_steps // 3))

    def since(now: Moment) -> bool:
        return now.step >= first

    rules: list[Rule] = [
        Limit(
            "features_one_way",
            "feature_std",
            0.05,
            high=False,
            says="feature_std is {value:.3f} (1: the features' directions are spread evenly; under {limit}: they all "
            "point one way). Lower optim.lr, lengthen optim.warmup_epochs, or look at the pictures: are the images "
            "all alike?",
            since=since,
        ),
        Limit(
            "rank_collapsed",
            "rankme_share",
            0.01,
            high=False,
            says="RankMe is {value:.2%} of what the features could fill (expected: more than {limit:.0%}, and rising): "
            "they vary in very few directions. Lower optim.lr, and for dino look at teacher_entropy",
            since=since,
        ),
    ]
    if isinstance(method, DinoConfig):
        rules += _dino_rules(method, since)
    if isinstance(method, MimConfig) and vocab_size is not None:
        rules.append(_at_ln_k("loss", vocab_size, f"codes ({vocab_size})", "Lower or raise optim.lr", since))
    if isinstance(method, MaeConfig | MimConfig):
        rules += _reconstruction_rules(method, since)
    if isinstance(method, DvaeConfig | VqkdConfig):
        rules.append(_dead_codes(method, lambda now: now.epoch >= 1))
    return rules


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


def _dino_rules(method: DinoConfig, since: Since) -> list[Rule]:
    uniform = math.log(int(method.prototypes))
    # of a run that is told apart by images, DINO's own loss: DINOv2's further terms count in `loss`
    several = method.ibot is not None or method.koleo_weight
    advice = ADVICE
    rules: list[Rule] = [
        _at_ln_k("dino" if several else "loss", int(method.prototypes), "prototypes", advice, since),
        TeacherUniform(uniform, since),
        Limit(
            "teacher_one_prototype",
            "one_prototype",
            0.01 * uniform,
            high=False,
            says="teacher_entropy and loss are both below {limit:.3f}: the teacher gives every image the same "
            "prototype (collapse to one). Raise method.teacher_temperature or lower method.center_momentum",
            since=since,
        ),
    ]
    if method.ibot is not None:
        own = method.ibot.prototypes if method.ibot.separate_head else None
        count = int(own or method.prototypes)
        rules.append(_at_ln_k("ibot_of_masked", count, "prototypes of the patch tokens", advice, since))
    return rules


def _at_ln_k(metric: str, count: int, of: str, advice: str, since: Since) -> Limit:
    return Limit(
        "loss_at_ln_k",
        metric,
        0.99 * math.log(count),
        high=True,
        says=f"{metric} {{value:.3f}} stands at ln of its {of} = {math.log(count):.3f}: nothing better than "
        f"guessing is learned. {advice}",
        since=since,
        slack=0.01,
    )


def _reconstruction_rules(method: MaeConfig | MimConfig, since: Since) -> list[Rule]:
    rules: list[Rule] = [
        Limit(
            "loss_at_zero",
            "loss",
            1e-3,
            high=False,
            says="loss is {value:.1e} (expected: above {limit}): there is nothing to predict. Are the images blank, or "
            "all alike? `selfsight data show` draws some",
            since=since,
        )
    ]
    if getattr(method, "norm_pix_loss", False) or getattr(method, "target", "") == "normalised_pixels":
        rules.append(
            Limit(
                "loss_at_mean",
                "loss",
                0.98,
                high=True,
                says="loss is {value:.3f} and 1 is reached by predicting the mean of each patch (expected by now: "
                "below {limit}). Raise or lower optim.lr; noise alone can't be predicted: look at the pictures",
                since=since,
                slack=0.01,
            )
        )
    return rules


def _dead_codes(method: DvaeConfig | VqkdConfig, since: Since) -> Limit:
    advice = (
        "Lower method.kl_weight or method.vocab_size, or set method.start=spread"
        if isinstance(method, DvaeConfig)
        else "Raise method.restart_below, or lower method.vocab_size or optim.lr"
    )
    return Limit(
        "dead_codes",
        "codes_used",
        0.05,
        high=False,
        says=f"only {{value:.1%}} of the codes were used in the last step (expected: more than {{limit:.0%}}). "
        f"{advice}",
        since=since,
    )


def derived(config: Config, metrics: dict[str, float]) -> dict[str, float]:
    """Numbers that an alarm of a method needs and no single metric is."""
    method, found = config.method, {}
    if isinstance(method, DinoConfig) and "teacher_entropy" in metrics:
        found["one_prototype"] = max(metrics["teacher_entropy"], metrics.get("dino", metrics["loss"]))
        if method.ibot is not None and "ibot" in metrics:
            found["ibot_of_masked"] = metrics["ibot"] / method.ibot.masked_share  # crops without masks count zero
    return found
