"""Logistic regression on cached frozen features: L-BFGS, regularisation chosen without a look at val."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import with_right
from eval.stratified import stratified_split

#: DINOv2's grid (Oquab et al. 2023, appendix B.3): 10^linspace(-6, 5, 45).
FULL_GRID = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))
#: Every fourth value of it.
COARSE_GRID = FULL_GRID[::4]


@dataclass(frozen=True)
class LogisticScores:
    """Val accuracy of the chosen strength, and how it came to be chosen."""

    top1: float
    top5: float | None  # above 5 classes
    chosen: float  # C, scikit-learn's: the inverse strength of regularisation
    held_out: float  # share of the held-out part of train that the choice classifies rightly
    grid: tuple[float, ...]
    at_grid_edge: bool
    logits: Tensor = field(repr=False, compare=False)  # (m, classes) of val


def logistic_probe(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int,
    groups: Tensor | None = None,
    grid: Sequence[float] = COARSE_GRID,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> LogisticScores:
    """Choose C on a held-out part of train (stratified, by `seed`; each of `groups` (n,) in one part), fit it on all of
    train, test on val.

    Features are (n, d) and (m, d), labels (n,) and (m,) in 0 .. num_classes - 1. Raises ValueError for an empty grid.
    """
    if not grid:
        raise ValueError("grid is empty; give at least one C, such as (1.0,)")
    train, val = train.to(device).float(), val.to(device).float()
    train_labels, val_labels = train_labels.to(device), val_labels.to(device)
    kept, rest = (rows.to(device) for rows in stratified_split(train_labels, held_out, seed, groups))

    kept_features, kept_labels = train.index_select(0, kept), train_labels[kept]
    rest_features, rest_labels = train.index_select(0, rest), train_labels[rest]
    scores: dict[float, float] = {}
    solutions: dict[float, tuple[Tensor, Tensor]] = {}
    solution = None
    for strength in sorted(grid):  # each solution starts the next, weaker one
        progress(f"logistic: C = {strength:.2g}")
        solution = fit(kept_features, kept_labels, strength, num_classes, start=solution)
        solutions[strength] = solution
        scores[strength] = _accuracy(solution, rest_features, rest_labels, 1)
    chosen = max(scores, key=lambda strength: (scores[strength], -strength))  # of equals the simplest
    progress("logistic: the chosen C on all of train")
    solution = fit(train, train_labels, chosen, num_classes, start=solutions[chosen], max_iterations=1000)
    return LogisticScores(
        top1=_accuracy(solution, val, val_labels, 1),
        top5=_accuracy(solution, val, val_labels, 5) if num_classes > 5 else None,
        chosen=chosen,
        held_out=scores[chosen],
        grid=tuple(grid),
        at_grid_edge=len(grid) > 1 and chosen in (min(grid), max(grid)),
        logits=torch.addmm(solution[1], val, solution[0].T).cpu(),
    )


def fit(
    features: Tensor,
    labels: Tensor,
    strength: float,
    num_classes: int,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias (classes,) that minimise scikit-learn's objective.

    That is C x the summed cross-entropy + |weight|^2 / 2, divided by C n so that the tolerance means the same for
    every C. The bias is free, so features may be centred for a better-conditioned descent: the minimum is the same.
    """
    centre = features.mean(dim=0)
    features = features - centre
    weight, bias = start or (features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes))
    weight, bias = weight.clone(), bias + weight @ centre
    penalty = 1 / (2 * strength * len(features))
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    descent = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        descent.zero_grad()
        loss = F.cross_entropy(torch.addmm(bias, features, weight.T), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        descent.step(objective)
    weight, bias = weight.detach(), bias.detach()
    return weight, bias - weight @ centre


def _accuracy(solution: tuple[Tensor, Tensor], features: Tensor, labels: Tensor, top: int) -> float:
    weight, bias = solution
    best = torch.addmm(bias, features, weight.T).topk(min(top, len(bias)), dim=1).indices
    return int((best == labels[:, None]).any(dim=1).sum()) / len(labels)


@dataclass(frozen=True)
class LogisticSettings:
    """Which strengths of regularisation are tried; `full`: all of DINOv2's."""

    full: bool = False
    held_out: float = 0.1  # share of train that chooses the strength


def run(store: Store, settings: LogisticSettings) -> Scores:
    """Accuracy of logistic regression on the headline feature, and how its strength was chosen."""
    train, val, name = store.train, store.val, store.headline
    found = logistic_probe(
        train.inputs[name], train.labels, val.inputs[name], val.labels, num_classes=store.num_classes,
        groups=train.groups, grid=FULL_GRID if settings.full else COARSE_GRID, held_out=settings.held_out,
        seed=store.seeds[0], device=store.device, progress=store.progress,
    )  # fmt: skip
    plain = {f.name: getattr(found, f.name) for f in fields(found) if f.name != "logits"}
    right = found.logits.argmax(dim=1) == val.labels
    return {"input": name, **with_right(plain, right, val.groups)}


def notes(result: Scores, settings: LogisticSettings) -> list[str]:
    """The chosen strength; and where it lies at the edge of the grid."""
    lines = [f"logistic: on {result['input']}, C {result['chosen']:.2g} of {len(result['grid'])}"]
    if result["at_grid_edge"]:
        lines.append(f"warning: the logistic probe's C {result['chosen']:.2g} lies at the edge of its grid")
    return lines


def columns(result: Scores, headline: str) -> list[Column]:
    """One."""
    return [Column("logistic", "logistic")]


SPEC = ProbeSpec("logistic", run, columns, LogisticSettings, labels=("class", "grade"), notes=notes, costly=True)
