"""Numbers to predict, such as age, yield or a count: ridge regression, and the mean of the nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import Outcome, scored
from eval.ridge import explained, ridge_probe, strata
from eval.scores import HEADLINE_K

_ELEMENTS = 2**25  # similarities held at once


@dataclass(frozen=True)
class RegressionSettings:
    """How much of train chooses strength and input; how many neighbours count, by cosine, each alike."""

    held_out: float = 0.1
    k: int = HEADLINE_K


def run(store: Store, settings: RegressionSettings) -> Scores:
    """R2 and mean absolute error of both, and the error of the mean of train, which is what is reached blindly."""
    train, val = store.train, store.val
    found = ridge_probe(
        train.inputs, train.labels[:, None], val.inputs, by=strata(train.labels), good=explained, groups=train.groups,
        held_out=settings.held_out, seed=store.seeds[0], device=store.device, progress=store.progress,
    )  # fmt: skip
    store.progress("k-NN regression")
    near = neighbour_means(
        train.inputs[store.headline].to(store.device), train.labels, val.inputs[store.headline], settings.k
    )
    return {
        "ridge": {
            **_errors(found.predicted[:, 0], val.labels, val.groups),
            "input": found.input,
            "strength": found.strength,
            "held_out": found.held_out,
            "at_grid_edge": found.at_grid_edge,
        },
        "knn": _errors(near, val.labels, val.groups),
        "blind": float((val.labels - train.labels.mean()).abs().mean()),
    }


def neighbour_means(train: Tensor, targets: Tensor, val: Tensor, k: int) -> Tensor:
    """(m,) the mean target of the k nearest by cosine of `train` (n, d), targets (n,), to each of `val` (m, d)."""
    train = F.normalize(train.float(), dim=1)
    targets = targets.to(train.device)
    found = []
    for queries in val.split(max(1, _ELEMENTS // len(train))):
        similarities = F.normalize(queries.to(train.device).float(), dim=1) @ train.T
        found.append(targets[similarities.topk(min(k, len(train)), dim=1).indices].mean(dim=1).cpu())
    return torch.cat(found)


def _errors(predicted: Tensor, targets: Tensor, groups: Tensor | None) -> Scores:
    return {
        "r2": scored(Outcome("r2", predicted, targets), groups=groups),
        "mean_absolute_error": scored(Outcome("mean", (predicted - targets).abs()), groups=groups),
    }


def columns(result: Scores, headline: str) -> list[Column]:
    """R2 and mean absolute error of ridge regression; more: of the neighbours."""
    return [
        Column(
            f"regression_{name}_{measure}", f"{title} {short}", ((name, measure),),
            headline=name == "ridge" and not lower, key="value",
            unit="number", chance=result["blind"] if lower else 0.0, lower_is_better=lower,
            more=name != "ridge",
        )
        for name, title in (("ridge", "ridge"), ("knn", "k-NN"))
        for measure, short, lower in (("r2", "R2", False), ("mean_absolute_error", "mean error", True))
    ]  # fmt: skip


def notes(result: Scores, settings: RegressionSettings) -> list[str]:
    """What was chosen, and what the error is of."""
    chosen = result["ridge"]
    edge = ", at the edge of what is tried" if chosen["at_grid_edge"] else ""
    return [
        f"regression: ridge on {chosen['input']}, strength {chosen['strength']:.2g}{edge}, chosen on train; R2 is 0 "
        "for who says the mean; the mean error is absolute, in the label's unit"
    ]


SPEC = ProbeSpec("regression", run, columns, RegressionSettings, labels="number", notes=notes, always=True)
