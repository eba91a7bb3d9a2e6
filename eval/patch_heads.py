"""What predicts the classes of patches from frozen features: a linear layer, and the nearest patches of train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.patches import Drawn

_CHUNK = 2048  # queries at a time

Head = Callable[[Tensor], Tensor]  # (b, t, d) features -> (b, t, classes) logits, or shares, on the CPU


@dataclass(frozen=True)
class Standard:
    """The mean and deviation of train's patches; what does not vary stays as it is, less its mean."""

    mean: Tensor  # (d,)
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standard:
        deviation = features.std(dim=0, correction=0)
        return cls(features.mean(dim=0), torch.where(deviation > 1e-6 * deviation.max(), deviation, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


def fit_linear(
    train: Drawn, strength: float, device: str, *, start: Tensor | None = None, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """Weights (d + 1, classes), the last row the bias, that minimise the cross-entropy against the shares of classes in
    each patch + strength x |weights|^2 / 2, and the value at which it ended; features are standardised already.

    A patch counts by the share of its pixels that are judged. L-BFGS from `start`.
    """
    features, targets = train.features.to(device), train.targets.to(device)
    weights = start.clone() if start is not None else features.new_zeros(features.shape[1] + 1, targets.shape[1])
    weights = weights.to(device).requires_grad_(True)
    total = targets.sum().clamp_min(1e-9)
    descent = torch.optim.LBFGS(
        [weights], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        descent.zero_grad()
        logits = torch.addmm(weights[-1], features, weights[:-1])
        loss = -(targets * logits.log_softmax(dim=1)).sum() / total + strength / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        end = descent.step(objective)
    return weights.detach(), end.detach()


def linear_head(weights: Tensor, standard: Standard, device: str) -> Head:
    """Logits of a linear layer on standardised features."""
    scale = weights[:-1] / standard.deviation.to(device)[:, None]
    bias = weights[-1] - standard.mean.to(device) @ scale

    def head(features: Tensor) -> Tensor:
        return (features.to(device) @ scale + bias).cpu()

    return head


def knn_head(bank: Drawn, k: int, temperature: float, device: str) -> Head:
    """The shares of classes in the k nearest patches of the bank by cosine similarity s, weighted by
    exp(s / temperature)."""
    stored = F.normalize(bank.features.to(device), dim=1)
    targets = bank.targets.to(device)
    nearest = min(k, len(stored))

    def one(queries: Tensor) -> Tensor:
        similarities, places = (F.normalize(queries.to(device), dim=1) @ stored.T).topk(nearest, dim=1)
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        votes = torch.einsum("qk,qkc->qc", weights, targets[places])
        return (votes / votes.sum(dim=1, keepdim=True).clamp_min(1e-12)).cpu()

    def head(features: Tensor) -> Tensor:
        flat = features.flatten(0, 1)
        return torch.cat([one(part) for part in flat.split(_CHUNK)]).unflatten(0, features.shape[:2])

    return head


def choose(candidates: Sequence[tuple[float, Head]], good: Callable[[Head], float]) -> tuple[float, float]:
    """Of (setting, head) the setting of the best, the first of equals, and how good that is."""
    scored = [(good(head), setting) for setting, head in candidates]
    best = max(score for score, _ in scored)
    return next(setting for score, setting in scored if score == best), best
