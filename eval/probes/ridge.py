"""Ridge classification: one-hot targets in closed form, so that there is neither a step size nor a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import with_right
from eval.ridge import ridge_probe


@dataclass(frozen=True)
class RidgeSettings:
    """How much of train chooses the strength and the input."""

    held_out: float = 0.1


def run(store: Store, settings: RidgeSettings) -> Scores:
    """Accuracy of the largest of the predicted one-hot values."""
    train, val = store.train, store.val

    def accuracy(predicted: Tensor, targets: Tensor) -> float:
        return float((predicted.argmax(dim=1) == targets.argmax(dim=1)).float().mean())

    found = ridge_probe(
        train.inputs, F.one_hot(train.labels, store.num_classes).float(), val.inputs, by=train.labels, good=accuracy,
        groups=train.groups, held_out=settings.held_out, seed=store.seeds[0], device=store.device,
        progress=store.progress,
    )  # fmt: skip
    right = found.predicted.argmax(dim=1) == val.labels
    top1 = int(torch.count_nonzero(right)) / len(right)
    chosen = {"input": found.input, "strength": found.strength, "held_out": found.held_out}
    return {**with_right({"top1": top1}, right, val.groups), **chosen, "at_grid_edge": found.at_grid_edge}


def columns(result: Scores, headline: str) -> list[Column]:
    """One."""
    return [Column("ridge", "ridge")]


def notes(result: Scores, settings: RidgeSettings) -> list[str]:
    """What was chosen; and where it lies at the edge of what is tried."""
    edge = ", at the edge of what is tried" if result["at_grid_edge"] else ""
    return [f"ridge: on {result['input']}, strength {result['strength']:.2g}{edge}, chosen on train"]


SPEC = ProbeSpec("ridge", run, columns, RidgeSettings, labels=("class", "grade"), notes=notes)
