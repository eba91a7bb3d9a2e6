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
    """h linear classifiers of one input, side by side, as they act on the features less `centre` (d,) and a one behind
    them: weight (classes * h, d + 1), its last column the bias.

    Classes come before heads: softmax over a slow axis is 13 times faster on a CPU than over a short fastest one.
    """

    input: str
    centre: Tensor
    weight: Tensor
    num_classes: int

    @property
    def num_heads(self) -> int:
        return len(self.weight) // self.num_classes

    def read(self, features: Mapping[str, Tensor], rows: Tensor, out: Tensor | None = None) -> Tensor:
        """(b, d + 1) the given rows less the centre, and a one; into `out`, whose last column is ones already."""
        values = features[self.input]
        gathered = values.index_select(0, rows.to(values.device)).to(self.centre)  # 9 times faster than values[rows]
        found = gathered.new_ones(len(rows), gathered.shape[1] + 1) if out is None else out
        torch.sub(gathered, self.centre, out=found[:, :-1])
        return found

    def logits(self, read: Tensor) -> Tensor:
        """(classes, h, b) of what was read (b, d + 1)."""
        return rearrange(self.weight @ read.T, "(c h) b -> c h b", c=self.num_classes)

    @torch.no_grad()
    def predict(self, features: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """(m, classes) on the CPU, of the given rows by the first classifier."""
        return torch.cat([self.logits(self.read(features, part))[:, 0].T.cpu() for part in self._parts(rows)])

    @torch.no_grad()
    def score(
        self, features: Mapping[str, Tensor], labels: Tensor, rows: Tensor
    ) -> tuple[list[float], list[float], list[float]]:
        """Top-1 share, top-5 share and mean loss on `rows`, of each classifier; of a diverged one 0, 0 and inf."""
        device = self.weight.device
        totals = torch.zeros(3, self.num_heads, dtype=torch.float64, device=device)
        classes = rearrange(torch.arange(self.num_classes, device=device), "c -> c 1 1")
        for part in self._parts(rows):
            logits = self.logits(self.read(features, part))
            target = repeat(labels[part].to(device), "b -> 1 h b", h=self.num_heads)
            own = logits.gather(0, target)
            # of equal logits the lower class wins, as in k-NN
            rank = ((logits > own) | ((logits == own) & (classes < target))).sum(dim=0)
            loss = logits.logsumexp(dim=0) - own[0]
            totals += torch.stack([(rank < 1).double(), (rank < 5).double(), loss.double()]).sum(dim=2)
        totals /= len(rows)
        diverged = ~totals[2].isfinite()
        totals[:2].masked_fill_(diverged, 0)
        totals[2].masked_fill_(diverged, math.inf)
        top1, top5, loss = totals.tolist()
        return top1, top5, loss

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(1, 2**24 // len(self.weight)))


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
    """One classifier of each kind and learning rate on the given rows, in that order, all in one pair of matrix
    products a step. The kinds are of one input.

    The classifiers share initial weights and batches, so they differ by kind and rate alone. What a head sees is
    (x - centre + offset) * scale: of a standardised one the offset is 0 and the scale the inverse deviation, of another
    the offset is the centre and the scale 1. Both lie in the weights, so the batch is read once for all. The gradient
    of the softmax cross-entropy is written out: a step costs one product (classes * h, d) x (d, b) forward and one
    back.
    """
    (name,) = {kind.input for kind in rates_of}
    generator = torch.Generator().manual_seed(seed)
    batch_size, dim = batch_size_of(recipe.batch_size, len(rows)), features[name].shape[1]
    first = (torch.randn(num_classes, dim, generator=generator) * 0.01).to(device)
    centre, inverse_deviation = _statistics(features[name], rows, device)
    flags = [kind.standardised for kind, rates in rates_of.items() for _ in rates]
    rates = torch.tensor([rate for rates in rates_of.values() for rate in rates], device=device)
    standardised = rearrange(torch.tensor(flags, device=device), "h -> h 1")
    scale = repeat(torch.where(standardised, inverse_deviation, 1.0), "h d -> (c h) d", c=num_classes)
    offset = repeat(torch.where(standardised, 0.0, centre), "h d -> (c h) d", c=num_classes)
    rate_of_row = repeat(rates * batch_size / 256, "h -> (c h) 1", c=num_classes)

    own = torch.cat([repeat(first, "c d -> (c h) d", h=len(flags)), first.new_zeros(len(scale), 1)], dim=1)
    heads = Classifiers(name, centre, torch.empty_like(own), num_classes)
    _act(own, scale, offset, out=heads.weight)
    momentum = torch.zeros_like(own)
    minus_one = own.new_full((1, len(flags), batch_size), -1.0)
    read = own.new_ones(batch_size, dim + 1)

    steps_per_epoch = len(rows) // batch_size
    num_steps = recipe.epochs * steps_per_epoch
    for step in range(num_steps):
        if step % steps_per_epoch == 0:  # the ragged end of a permutation is left out, another one every epoch
            order = rows[torch.randperm(len(rows), generator=generator)]
        begin = step % steps_per_epoch * batch_size
        batch = order[begin : begin + batch_size]
        heads.read(features, batch, out=read)
        # (softmax - one-hot) / b is the gradient of the mean cross-entropy
        share = heads.logits(read).softmax(dim=0)
        target = repeat(labels[batch].to(device), "b -> 1 h b", h=heads.num_heads)
        share.scatter_add_(0, target, minus_one)
        gradient = (rearrange(share, "c h b -> (c h) b") @ read).div_(batch_size)
        gradient[:, :-1].addcmul_(offset, gradient[:, -1:]).mul_(scale)
        momentum.mul_(recipe.momentum).add_(gradient)
        own.addcmul_(momentum, rate_of_row * (0.5 * (1 + math.cos(math.pi * step / num_steps))), value=-1)
        _act(own, scale, offset, out=heads.weight)
    return heads


def _act(own: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """Weights (n, d + 1) of features less their centre, from weights of what a head sees."""
    torch.mul(own[:, :-1], scale, out=out[:, :-1])
    torch.add(own[:, -1], torch.linalg.vecdot(out[:, :-1], offset), out=out[:, -1])


def _statistics(features: Tensor, rows: Tensor, device: torch.device | str, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """(d,) mean and inverse standard deviation over the given rows; a constant feature is left at zero."""
    count, mean, squares = 0, *torch.zeros(2, features.shape[1], dtype=torch.float64, device=features.device)
    for part in rows.to(features.device).split(chunk):
        values = features.index_select(0, part).float()
        part_mean = values.mean(dim=0)
        part_squares = values.sub_(part_mean).square_().sum(dim=0)
        # Chan, Golub & LeVeque 1979: of two parts the squares about the mean of both
        away, total = part_mean.double() - mean, count + len(part)
        squares += part_squares + away.square() * (count * len(part) / total)
        mean, count = mean + away * (len(part) / total), total
    # BatchNorm's way; 1e-6 as in MAE's probe
    return mean.float().to(device), (squares / count + 1e-6).rsqrt().float().to(device)
