"""Ridge regression in closed form, for every strength of regularisation at once (Hoerl & Kennard 1970)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.statistics import r2
from eval.stratified import stratified_split

#: Of regularisation, in units of the mean variance of the features times the images.
STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-14, 7))
#: Wider inputs are left out where a narrower one is there: the cost grows with the cube.
MOST_WIDTH = 4096
_CHUNK = 8192

Goodness = Callable[[Tensor, Tensor], float]  # (predicted (m, k), targets (m, k)) -> the larger the better


@dataclass(frozen=True)
class RidgeFit:
    """The chosen predictor, and how it came to be chosen.

    predicted: (m, k) of val. predict: the same of other features of that input, (m, d) -> (m, k).
    input, strength: chosen on the held-out part of train, where it had `held_out`.
    """

    predicted: Tensor = field(repr=False, compare=False)
    predict: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    input: str
    strength: float
    held_out: float
    at_grid_edge: bool


def strata(labels: Tensor) -> Tensor:
    """(n,) int64 by which a part of train is held out: the classes of labels (n,) int64; for all others none."""
    return labels if labels.dtype == torch.int64 else torch.zeros(len(labels), dtype=torch.int64)


def explained(predicted: Tensor, targets: Tensor) -> float:
    """R2 of predicted (m, 1) for targets (m, 1); of one target only, where it is not defined, minus the mean square
    error."""
    found = float(r2(predicted[:, 0], targets[:, 0], torch.ones(1, len(targets)))[0])
    return found if math.isfinite(found) else -float((predicted - targets).square().mean())


def ridge_probe(
    train: Mapping[str, Tensor],
    train_targets: Tensor,
    val: Mapping[str, Tensor],
    *,
    by: Tensor,
    good: Goodness,
    groups: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    held_out: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> RidgeFit:
    """Choose input and strength by `good` on a held-out part of train (stratified `by` (n,) int64; each of `groups`
    (n,) in one part), fit them on all of train, predict val.

    `train`, `val`: inputs (n, d) and (m, d) by name; train_targets (n, k).
    """
    kept, rest = stratified_split(by, held_out, seed, groups)
    targets = train_targets.to(device).double()
    narrow = min(values.shape[1] for values in train.values())
    best: tuple[float, float, str] | None = None
    for name, features in train.items():
        if features.shape[1] > max(MOST_WIDTH, narrow):
            continue
        progress(f"ridge: {name}")
        path = _Path(features, targets, kept, device)
        for strength in sorted(strengths, reverse=True):  # of equals the simplest
            found = good(path.predict(features, rest, strength), train_targets[rest])
            if best is None or found > best[0]:
                best = (found, strength, name)
    assert best is not None
    goodness, strength, name = best
    progress(f"ridge: {name} on all of train")
    path = _Path(train[name], targets, torch.arange(len(targets)), device)

    def predict(features: Tensor) -> Tensor:
        return path.predict(features, torch.arange(len(features)), strength)

    at_edge = strength in (min(strengths), max(strengths))
    return RidgeFit(predict(val[name]), predict, name, strength, goodness, at_edge)


class _Path:
    """The solutions of (X'X + s I) w = X'y for every s, from one eigendecomposition; X and y are centred."""

    def __init__(self, features: Tensor, targets: Tensor, rows: Tensor, device: str) -> None:
        self.device = device
        width = features.shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        cross = torch.zeros(width, targets.shape[1], dtype=torch.float64, device=device)
        total = torch.zeros(width, dtype=torch.float64, device=device)
        self.shift = features[rows[0]].to(device).float()  # near the mean: squares lose nothing
        self.target_mean = targets[rows].mean(dim=0)
        for part in rows.split(_CHUNK):
            # products in float32, sums in float64: a chunk's rounding stays a chunk's
            values = features.index_select(0, part).to(device).float() - self.shift
            gram += (values.T @ values).double()
            cross += (values.T @ (targets[part] - self.target_mean).float()).double()
            total += values.sum(dim=0, dtype=torch.float64)
        self.mean = total / len(rows)
        gram -= len(rows) * self.mean[:, None] * self.mean[None, :]
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.unit = float(self.values.clamp_min(0).mean())
        self.projected = self.vectors.T @ cross

    def predict(self, features: Tensor, rows: Tensor, strength: float) -> Tensor:
        """(m, k) float32 on the CPU."""
        inverse = 1 / (self.values.clamp_min(0) + strength * max(self.unit, 1e-12))
        weight = self.vectors @ (inverse[:, None] * self.projected)
        bias = (self.target_mean - self.mean @ weight).float()
        parts = []
        for part in rows.split(_CHUNK):
            values = features.index_select(0, part).to(self.device).float() - self.shift
            parts.append((values @ weight.float() + bias).cpu())
        return torch.cat(parts)
