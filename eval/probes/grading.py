"""Ordered grades, such as stages of an illness: who misses by one grade errs less than who misses by three."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import Outcome, scored
from eval.ridge import ridge_probe
from eval.statistics import quadratic_kappa


@dataclass(frozen=True)
class GradingSettings:
    """How much of train chooses strength and input."""

    held_out: float = 0.1


def run(store: Store, settings: GradingSettings) -> Scores:
    """Quadratic weighted kappa and mean error in grades, of ridge regression on the grade's place, rounded."""
    train, val = store.train, store.val
    last = store.num_classes - 1

    def rounded(predicted: Tensor) -> Tensor:
        return predicted[:, 0].round().clamp(0, last).long()

    def good(predicted: Tensor, targets: Tensor) -> float:
        return float(quadratic_kappa(rounded(predicted), targets[:, 0].long(), torch.ones(1, len(targets)))[0])

    found = ridge_probe(
        train.inputs, train.labels[:, None].float(), val.inputs, by=train.labels, good=good, groups=train.groups,
        held_out=settings.held_out, seed=store.seeds[0], device=store.device, progress=store.progress,
    )  # fmt: skip
    grades = rounded(found.predicted)
    blind = train.labels.double().mean().round()
    return {
        "kappa": scored(Outcome("quadratic_kappa", grades, val.labels), groups=val.groups),
        "mean_absolute_error": scored(Outcome("mean", (grades - val.labels).abs().float()), groups=val.groups),
        "blind": float((val.labels - blind).abs().mean()),
        "input": found.input,
        "strength": found.strength,
        "held_out": found.held_out,
    }


def columns(result: Scores, headline: str) -> list[Column]:
    """Kappa; more: how many grades it is off."""
    return [
        Column("grading_kappa", "weighted kappa", (("kappa",),), key="value", unit="number", chance=0.0),
        Column(
            "grading_mean_error", "grades off", (("mean_absolute_error",),), headline=False, key="value", unit="number",
            chance=result["blind"], lower_is_better=True, more=True,
        ),
    ]  # fmt: skip


def notes(result: Scores, settings: GradingSettings) -> list[str]:
    """What was chosen."""
    return [
        f"grading: ridge regression of the grade's place on {result['input']}, rounded; Cohen's kappa with quadratic "
        "weights"
    ]


SPEC = ProbeSpec("grading", run, columns, GradingSettings, labels="grade", notes=notes, always=True)
