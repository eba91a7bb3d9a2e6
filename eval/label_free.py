"""What features say of themselves without any label: how many dimensions they fill, and how they lie on the sphere.

All take features (n, d) and compute in fp64. Where a number comes with its error, that is an infinitesimal jackknife
(Efron 1982): an image adds to each eigenvalue the square of its part along that eigenvector, to first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.scores import Z95

RANKS = (4, 100)  # of the eigenvalues that alpha-ReQ's line is fitted to: the authors' code
MOST_PAIRED = 8192  # images of which every pair is compared
_FEWEST_RANKS = 10
_PAIRS_AT_ONCE = 2**24


def effective_rank(singular: Tensor, eps: float = 1e-7) -> Tensor:
    """exp of the entropy of the shares of singular values (.., k), eps added to each: RankMe's (Garrido et al. 2023,
    equation 1); Roy & Vetterli 2007. All zero: 1."""
    total = singular.sum(dim=-1, keepdim=True)
    shares = singular / total.clamp_min(1e-300) + eps
    found = (-(shares * shares.log()).sum(dim=-1)).exp().clamp(1.0, float(max(1, singular.shape[-1])))
    return torch.where(total[..., 0] > 0, found, torch.ones_like(found))


def power_law(eigenvalues: Tensor) -> Tensor:
    """alpha of eigenvalues (k,) of a covariance, which fall like rank ** -alpha (Agrawal et al. 2022).

    As the authors' code has it: a line through the logarithms of ranks 4 to 100, weighted by 1 / rank (Stringer et al.
    2019). NaN where fewer than ten of these are more than nothing.
    """
    ordered = eigenvalues.sort(descending=True).values
    used = ordered[RANKS[0] - 1 : RANKS[1]]
    used = used[used > 1e-12 * ordered[0].detach()]
    if len(used) < _FEWEST_RANKS:
        return used.sum() * math.nan
    rank = torch.arange(RANKS[0], RANKS[0] + len(used), device=used.device, dtype=used.dtype)
    weight = 1 / rank / (1 / rank).sum()
    x, y = rank.log(), used.log()
    x = x - (weight * x).sum()
    return -(weight * x * y).sum() / (weight * x.square()).sum()


def of_spectrum(
    features: Tensor,
    number: Callable[[Tensor], Tensor],
    groups: Tensor | None = None,
    *,
    centred: bool,
) -> dict[str, Any]:
    """`value`, `standard_error` and `interval` of a number of the eigenvalues (d,) of features' second moments, or
    with `centred` of their covariance. What `groups` (n,) have in common is left out together."""
    values = features.double()
    if centred:
        values = values - values.mean(dim=0)
    eigenvalues, vectors = torch.linalg.eigh(values.T @ values / len(values))
    # of fewer images than dimensions the rest are zero but for rounding
    eigenvalues = eigenvalues.clamp_min(0)[-min(values.shape) :].requires_grad_(True)
    with torch.enable_grad():
        found = number(eigenvalues)
        (slope,) = torch.autograd.grad(found, eigenvalues)
    eigenvalues = eigenvalues.detach()
    slope = torch.where(eigenvalues > 1e-12 * eigenvalues.max(), slope, 0)  # the root of nothing has none
    vectors = vectors[:, -len(eigenvalues) :]
    moved = torch.cat([((part @ vectors).square() - eigenvalues) @ slope for part in values.split(4096)])
    return _with_error(float(found.detach()), moved / len(values), groups)


def rankme(features: Tensor, groups: Tensor | None = None) -> dict[str, Any]:
    """RankMe: the effective rank of features (n, d) as they are."""
    return of_spectrum(features, _rank_of_eigenvalues, groups, centred=False)


def centred_rank(features: Tensor, groups: Tensor | None = None) -> dict[str, Any]:
    """The effective rank of features (n, d) less their mean."""
    return of_spectrum(features, _rank_of_eigenvalues, groups, centred=True)


def alpha_req(features: Tensor, groups: Tensor | None = None) -> dict[str, Any] | None:
    """alpha-ReQ of features (n, d), near 1 in those that do well (Agrawal et al. 2022); None of too few dimensions."""
    found = of_spectrum(features, power_law, groups, centred=True)
    return None if math.isnan(found["value"]) else found


def uniformity(features: Tensor, groups: Tensor | None = None, *, seed: int = 0) -> dict[str, Any]:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different images, brought to length 1 (Wang & Isola 2020).

    From 0, all alike, down to about -4, spread evenly. Of up to `MOST_PAIRED` images, drawn by `seed`.
    """
    if len(features) > MOST_PAIRED:
        rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:MOST_PAIRED]
        groups = None if groups is None else groups[rows]
        features = features[rows.to(features.device)]
    unit = F.normalize(features.float(), dim=1)
    sums = []
    for part in unit.split(max(1, _PAIRS_AT_ONCE // len(unit))):
        sums.append((4 * (part @ unit.T).clamp(-1, 1) - 4).exp().sum(dim=1).double())
    num = len(unit)
    of_image = (torch.cat(sums) - 1) / max(1, num - 1)  # not with itself
    mean = of_image.mean().clamp_min(1e-300)
    return _with_error(float(mean.log()), 2 * (of_image / mean - 1) / num, groups)


def ranks_within(tokens: Tensor) -> Tensor:
    """(b,) the effective rank of each image's tokens (b, t, d) less their mean: 1 where they vary in one direction."""
    values = tokens.double()
    values = values - values.mean(dim=1, keepdim=True)
    gram = values @ values.mT if values.shape[1] < values.shape[2] else values.mT @ values
    return effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def of_mean(values: Tensor, groups: Tensor | None = None) -> dict[str, Any]:
    """The mean of one number an image (n,), with its error."""
    values = values.double()
    return _with_error(float(values.mean()), (values - values.mean()) / len(values), groups)


def _rank_of_eigenvalues(eigenvalues: Tensor) -> Tensor:
    return effective_rank(eigenvalues.sqrt())


def _with_error(value: float, influence: Tensor, groups: Tensor | None) -> dict[str, Any]:
    """A score of how much each image moves the value."""
    influence = influence.cpu()
    if groups is not None:
        _, unit = torch.unique(groups.cpu(), return_inverse=True)
        influence = influence.new_zeros(int(unit.max()) + 1).index_add_(0, unit, influence)
    error = float(influence.square().sum().sqrt())
    return {"value": value, "standard_error": error, "interval": [value - Z95 * error, value + Z95 * error]}
