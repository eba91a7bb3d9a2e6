"""The one protocol under which everything is probed: the encoder, its untrained self, raw pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from eval.features import FeatureSet
from eval.knn import KS, TEMPERATURE, knn_accuracy
from eval.linear import LinearRecipe, linear_probe
from eval.logistic import logistic_probe
from eval.scores import HEADLINE_K, deviation_of, mean_of


@dataclass(frozen=True)
class Protocol:
    """What is measured and how. Part of every result, and of the key under which baselines are kept."""

    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE
    linear: LinearRecipe = field(default_factory=LinearRecipe)
    seeds: tuple[int, ...] = (0, 1, 2)  # the first also splits train; one linear probe each
    logistic_grid: tuple[float, ...] = ()  # of C; empty: no logistic regression
    last_blocks: int = 4
    features: str = "cached centre crops"

    def __post_init__(self) -> None:
        if HEADLINE_K not in self.ks:
            raise ValueError(f"ks is {self.ks}; k = {HEADLINE_K} is the headline and must be among them")


def score(
    train: FeatureSet,
    val: FeatureSet,
    protocol: Protocol,
    *,
    num_classes: int,
    headline: str,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """k-NN, linear and (where asked) logistic accuracy of one set of features, as plain JSON values.

    Shares are in 0 .. 1, each top-1 with the binomial standard error over val. k-NN is computed for every single
    feature, the logistic probe on the `headline` feature, and the linear probe chooses among all inputs.
    """
    num_val = len(val.labels)
    knn = {}
    for name in (headline, *(n for n in ("class", "mean", "pooled") if n in train.inputs and n != headline)):
        progress(f"k-NN: {name}")
        by_k = knn_accuracy(
            train.inputs[name].to(device), train.labels, val.inputs[name], val.labels,
            num_classes=num_classes, ks=protocol.ks, temperature=protocol.temperature,
        )  # fmt: skip
        knn[name] = {str(k): with_error(shares, num_val) for k, shares in by_k.items()}
    linear = linear_probe(
        train.inputs, train.labels, val.inputs, val.labels,
        num_classes=num_classes, recipe=protocol.linear, seeds=protocol.seeds, device=device, progress=progress,
    )  # fmt: skip
    scores: dict[str, Any] = {
        "num_train": len(train.labels),
        "num_val": num_val,
        "headline": headline,
        "dim": train.inputs[headline].shape[1],
        "knn": knn,
        "linear": {
            **with_error({"top1": mean_of(linear.top1)}, num_val),
            **({} if linear.top5 is None else {"top5": mean_of(linear.top5)}),
            "top1_of_seed": dict(zip(map(str, protocol.seeds), linear.top1, strict=True)),
            "std_over_seeds": deviation_of(linear.top1),
            **{k: v for k, v in asdict(linear).items() if k not in ("top1", "top5")},
        },
    }
    if protocol.logistic_grid:
        logistic = logistic_probe(
            train.inputs[headline], train.labels, val.inputs[headline], val.labels,
            num_classes=num_classes, grid=protocol.logistic_grid, held_out=protocol.linear.held_out,
            seed=protocol.seeds[0], device=device, progress=progress,
        )  # fmt: skip
        scores["logistic"] = {"input": headline, **with_error(asdict(logistic), num_val)}
    return scores


def with_error(shares: dict[str, Any], num_val: int) -> dict[str, Any]:
    """The same with `standard_error`: of the binomial share top1 over `num_val` independent samples."""
    top1 = shares["top1"]
    return {**shares, "standard_error": math.sqrt(top1 * (1 - top1) / num_val)}
