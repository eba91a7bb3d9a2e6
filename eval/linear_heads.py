"""Linear classifiers on frozen features, many side by side, trained by SGD: what the linear probe chooses among."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor


class Kind(NamedTuple):
    """What a head reads, and whether it is standardised."""

    input: str
    standardised: bool

    def __str__(self) -> str:
        return f"{self.input}{', standardised' if self.standardised else ''}"


class Recipe(Protocol):
    """How they are trained: SGD with momentum, no weight decay, cosine to zero."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def momentum(self) -> float: ...


@dataclass(frozen=True)
class Classifiers:
    """h linear classifiers of each of k kinds, side by side: weight (k, classes * h, d), bias (k, classes * h, 1).

    Classes come before rates: softmax over a slow axis is 13 times faster on a CPU than over a short fastest one.
    scaling: of the kinds that are standardised (d,) mean and inverse deviation.
    """

    kinds: tuple[Kind, ...]
    weight: Tensor
    bias: Tensor
    scaling: dict[Kind, tuple[Tensor, Tensor]]
    num_classes: int

    def prepare(self, features: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """(k, b, d) the given rows as the classifiers see them; every input is gathered once.

        To gather the whole row once for inputs of all widths would spare a fiftieth of a step
        (tests/bench/linear_heads.py), and give all widths the same order of batches, other than theirs so far.
        """
        prepared = self.weight.new_empty(len(self.kinds), len(rows), self.weight.shape[2])
        gathered: dict[str, Tensor] = {}
        for place, kind in enumerate(self.kinds):
            if kind.input not in gathered:  # index_select is 9 times faster than features[rows]
                values = features[kind.input]
                gathered[kind.input] = values.index_select(0, rows.to(values.device)).to(prepared)
            if kind in self.scaling:
                centre, inverse_scale = self.scaling[kind]
                torch.sub(gathered[kind.input], centre, out=prepared[place]).mul_(inverse_scale)
            else:
                prepared[place] = gathered[kind.input]
        return prepared

    def logits(self, prepared: Tensor) -> Tensor:
        """(k, classes, h, b) from prepared features (k, b, d)."""
        flat = torch.baddbmm(self.bias, self.weight, prepared.mT)
        return rearrange(flat, "k (c h) b -> k c h b", c=self.num_classes)

    @torch.no_grad()
    def predict(self, features: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """(m, classes) on the CPU, of the given rows by the first classifier of the first kind."""
        parts = rows.split(max(1, 2**24 // (self.bias.shape[0] * self.bias.shape[1])))
        return torch.cat([self.logits(self.prepare(features, part))[0, :, 0].T.cpu() for part in parts])

    @torch.no_grad()
    def score(
        self, features: Mapping[str, Tensor], labels: Tensor, rows: Tensor
    ) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
        """Top-1 share, top-5 share and mean loss on `rows`, [kind][rate] each; of a diverged one 0, 0 and inf."""
        num_heads, device = self.bias.shape[1] // self.num_classes, self.weight.device
        totals = torch.zeros(3, len(self.kinds), num_heads, dtype=torch.float64, device=device)
        classes = rearrange(torch.arange(self.num_classes, device=device), "c -> 1 c 1 1")
        for part in rows.split(max(1, 2**24 // (self.bias.shape[0] * self.bias.shape[1]))):
            logits = self.logits(self.prepare(features, part))
            target = repeat(labels[part].to(device), "b -> k 1 h b", k=len(self.kinds), h=num_heads)
            own = logits.gather(1, target)
            # of equal logits the lower class wins, as in k-NN
            rank = ((logits > own) | ((logits == own) & (classes < target))).sum(dim=1)
            loss = logits.logsumexp(dim=1) - own[:, 0]
            totals += torch.stack([(rank < 1).double(), (rank < 5).double(), loss.double()]).sum(dim=3)
        totals /= len(rows)
        diverged = ~totals[2].isfinite()
        totals[:2].masked_fill_(diverged, 0)
        totals[2].masked_fill_(diverged, math.inf)
        top1, top5, loss = totals.tolist()
        return top1, top5, loss


def batch_size_of(wanted: int, num_rows: int) -> int:
    """The `wanted` batch, or what gives a small train set about 16 steps an epoch."""
    return min(wanted, max(16, num_rows // 16), num_rows)


@torch.no_grad()
def fit(
    features: Mapping[str, Tensor],
    labels: Tensor,
    rows: Tensor,
    rates_of: Mapping[Kind, Sequence[float]],
    num_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device | str,
) -> Classifiers:
    """One classifier of each kind and learning rate on the given rows, all in one pair of matrix products a step.

    The kinds are as wide as one another and have as many rates. The classifiers share initial weights and batches, so
    they differ by kind and rate alone. The gradient of the softmax cross-entropy is written out: a step costs one
    product (classes * h, d) x (d, b) a kind forward and one back.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds, rates = tuple(rates_of), torch.tensor(list(rates_of.values()), device=device)
    (num_kinds, num_rates), dim = rates.shape, features[kinds[0].input].shape[1]
    batch_size = batch_size_of(recipe.batch_size, len(rows))
    first = (torch.randn(num_classes, dim, generator=generator) * 0.01).to(device)
    scaling = {kind: _statistics(features[kind.input], rows, device) for kind in kinds if kind.standardised}
    weight = repeat(first, "c d -> k (c h) d", k=num_kinds, h=num_rates).contiguous()
    bias = weight.new_zeros(num_kinds, num_classes * num_rates, 1)
    heads = Classifiers(kinds, weight, bias, scaling, num_classes)
    rate_of_row = repeat(rates * batch_size / 256, "k h -> k (c h) 1", c=num_classes)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    minus_one = torch.full((num_kinds, 1, num_rates, batch_size), -1.0, device=device)

    steps_per_epoch = len(rows) // batch_size
    num_steps = recipe.epochs * steps_per_epoch
    for step in range(num_steps):
        if step % steps_per_epoch == 0:  # the ragged end of a permutation is left out, another one every epoch
            order = rows[torch.randperm(len(rows), generator=generator)]
        begin = step % steps_per_epoch * batch_size
        batch = order[begin : begin + batch_size]
        prepared = heads.prepare(features, batch)
        # (softmax - one-hot) / b is the gradient of the mean cross-entropy
        gradient = heads.logits(prepared).softmax(dim=1)
        own = repeat(labels[batch].to(device), "b -> k 1 h b", k=num_kinds, h=num_rates)
        gradient.scatter_add_(1, own, minus_one)
        gradient = rearrange(gradient, "k c h b -> k (c h) b").div_(batch_size)
        weight_momentum.baddbmm_(gradient, prepared, beta=recipe.momentum)
        bias_momentum.mul_(recipe.momentum).add_(gradient.sum(dim=2, keepdim=True))
        rate = rate_of_row * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
        weight.addcmul_(weight_momentum, rate, value=-1)
        bias.addcmul_(bias_momentum, rate, value=-1)
    return heads


def _statistics(features: Tensor, rows: Tensor, device: torch.device | str, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """(d,) mean and inverse standard deviation over the given rows; a constant feature is left at zero."""
    total = torch.zeros(2, features.shape[1], dtype=torch.float64, device=features.device)
    shift = features[0].double()  # near the mean: variances by squares lose nothing
    for part in rows.to(features.device).split(chunk):
        values = features.index_select(0, part).double() - shift
        total += torch.stack([values.sum(0), values.square().sum(0)])
    mean, square = total / len(rows)
    variance = (square - mean.square()).clamp_min(0)
    # BatchNorm's way; 1e-6 as in MAE's probe
    return (mean + shift).float().to(device), (variance + 1e-6).rsqrt().float().to(device)
