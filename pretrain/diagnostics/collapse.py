"""The ways in which what is learned becomes worthless: collapse, trivial targets, a vocabulary that dies."""

from __future__ import annotations

import math
from collections.abc import Callable

from pretrain.config import Config, DinoConfig, DvaeConfig, MaeConfig, MimConfig, VqkdConfig
from pretrain.diagnostics.alarms import Limit, Moment, Rule
from pretrain.engines.schedules import Timeline

EARLY_STEPS = 50  # of which nothing can be told yet
Since = Callable[[Moment], bool]


def collapse_rules(config: Config, timeline: Timeline, vocabulary: int | None = None) -> list[Rule]:
    """The alarms that a run's method can give. `vocabulary`: codes of the tokenizer, where codes are predicted.

    Early steps are spared: every DINO run starts at ln K, and every reconstruction at the mean.
    """
    method = config.method
    start = max(1.0, getattr(method, "freeze_last_layer_epochs", 0.0), config.optim.warmup_epochs / 2)
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
    if isinstance(method, MimConfig) and vocabulary is not None:
        rules.append(_at_ln_k("loss", vocabulary, f"codes ({vocabulary})", "Lower or raise optim.lr", since))
    if isinstance(method, MaeConfig | MimConfig):
        rules += _reconstruction_rules(method, since)
    if isinstance(method, DvaeConfig | VqkdConfig):
        rules.append(_dead_codes(method, lambda now: now.epoch >= 1))
    return rules


def _dino_rules(method: DinoConfig, since: Since) -> list[Rule]:
    uniform = math.log(int(method.prototypes))
    # of a run that is told apart by images, DINO's own loss: DINOv2's further terms count in `loss`
    several = method.ibot is not None or method.koleo_weight
    advice = "Lower method.teacher_temperature or optim.lr, or lengthen optim.warmup_epochs"
    rules: list[Rule] = [
        _at_ln_k("dino" if several else "loss", int(method.prototypes), "prototypes", advice, since),
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
