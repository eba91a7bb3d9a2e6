"""What predicts the classes of patches from frozen features: a linear layer, and the nearest patches of train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
    train: Drawn, strength: float, device: str, *, start: Tensor | None = None, iterations: int = 30
) -> Tensor:
    """Weights (d + 1, classes), the last row the bias, that minimise the cross-entropy against the shares of classes in
    each patch + strength x |weights|^2 / 2; features are standardised already.

    A patch counts by the share of its pixels that are judged. L-BFGS from `start`, by the gradient in closed form: a
    fourth of the time that autograd takes.
    """
    features, targets = train.features.to(device), train.targets.to(device).T.contiguous()
    weights = start.clone() if start is not None else features.new_zeros(features.shape[1] + 1, len(targets))
    weights = weights.to(device).requires_grad_(True)
    judged = targets.sum(dim=0)
    total = judged.sum().clamp_min(1e-9)
    descent = torch.optim.LBFGS(
        [weights], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def objective() -> Tensor:
        logits = torch.addmm(weights[-1][:, None], weights[:-1].T, features.T)  # (classes, n)
        log_total = logits.logsumexp(dim=0)
        loss = ((judged * log_total).sum() - (targets * logits).sum()) / total
        loss = loss + strength / 2 * weights[:-1].square().sum()
        wrong = logits.sub_(log_total).exp_().mul_(judged).sub_(targets).div_(total)
        weights.grad = torch.cat([(wrong @ features).T + strength * weights[:-1], wrong.sum(dim=1)[None]])
        return loss

    descent.step(objective)
    return weights.detach()


def linear_head(weights: Tensor, standard: Standard, device: str) -> Head:
    """Logits of a linear layer on standardised features."""
    scale = weights[:-1] / standard.deviation.to(device)[:, None]
    bias = weights[-1] - standard.mean.to(device) @ scale

    def head(features: Tensor) -> Tensor:
        return (features.to(device) @ scale + bias).cpu()

    return head


def knn_heads(bank: Drawn, ks: Sequence[int], temperature: float, device: str) -> dict[int, Head]:
    """By k, the shares of classes in the k nearest patches of the bank by cosine similarity s, weighted by
    exp(s / temperature). They look for neighbours once in what they are given one after the other."""
    stored = F.normalize(bank.features.to(device), dim=1)
    targets = bank.targets.to(device)
    most = min(max(ks), len(stored))
    last: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []

    def near(features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights and places of neighbours, some queries at a time."""
        if not last or last[0][0] is not features:
            found = []
            for part in features.flatten(0, 1).split(_CHUNK):
                similarities, places = (F.normalize(part.to(device), dim=1) @ stored.T).topk(most, dim=1)
                found.append((((similarities - similarities[:, :1]) / temperature).exp(), places))
            last[:] = [(features, found)]
        return last[0][1]

    def head(features: Tensor, k: int) -> Tensor:
        parts = []
        for weights, places in near(features):
            votes = torch.einsum("qk,qkc->qc", weights[:, :k], targets[places[:, :k]])
            parts.append((votes / votes.sum(dim=1, keepdim=True).clamp_min(1e-12)).cpu())
        return torch.cat(parts).unflatten(0, features.shape[:2])

    return {k: partial(head, k=k) for k in ks}
