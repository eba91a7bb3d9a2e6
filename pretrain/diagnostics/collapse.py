"""The ways in which what is learned becomes worthless: collapse, trivial targets, a vocabulary that dies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pretrain.config import Config
from pretrain.diagnostics.alarms import Limit, Moment, Rule
from pretrain.engines.schedules import Timeline
from pretrain.methods.registry import spec_of

EARLY_STEPS = 50  # of which nothing can be told yet
Since = Callable[[Moment], bool]


def collapse_rules(config: Config, timeline: Timeline, learner: Any = None) -> list[Rule]:
    """The alarms that a run's method can give. `learner`: the Method that learns.

    Early steps are spared: every DINO run starts at ln K, and every reconstruction at the mean.
    """
    method = config.method
    # DINO shows within tens of steps after its prototypes thaw, at however low a rate
    start = max(1.0, getattr(method, "freeze_last_layer_epochs", config.optim.warmup_epochs / 2))
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
    return rules + (spec_of(method).call("alarms", config, learner, since) or [])


def at_ln_k(metric: str, count: int, of: str, advice: str, since: Since) -> Limit:
    """Nothing better than guessing among `count` is learned: `metric` stands at the logarithm of it."""
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


def nothing_to_predict(since: Since) -> Limit:
    """A reconstruction of loss zero."""
    return Limit(
        "loss_at_zero",
        "loss",
        1e-3,
        high=False,
        says="loss is {value:.1e} (expected: above {limit}): there is nothing to predict. Are the images blank, or "
        "all alike? `selfsight data show` draws some",
        since=since,
    )


def at_mean(since: Since) -> Limit:
    """A standardised patch predicted no better than by its mean."""
    return Limit(
        "loss_at_mean",
        "loss",
        0.98,
        high=True,
        says="loss is {value:.3f} and 1 is reached by predicting the mean of each patch (expected by now: "
        "below {limit}). Raise or lower optim.lr; noise alone can't be predicted: look at the pictures",
        since=since,
        slack=0.01,
    )


def dead_codes(advice: str) -> Limit:
    """A tokenizer that uses few of its codes."""
    return Limit(
        "dead_codes",
        "codes_used",
        0.05,
        high=False,
        says="only {value:.1%} of the codes were used in the last step (expected: more than {limit:.0%}). " + advice,
        since=lambda now: now.epoch >= 1,
    )
