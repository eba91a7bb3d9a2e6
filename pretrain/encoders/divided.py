"""Parameters of which each rank holds some rows, such as experts, and what ranks exchange to use them.

`Ranks` are made by `engines/expert_parallel.py`, which divides what has a method `divide(ranks)`. Without ranks, as
everywhere but in such a run, nothing here does anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """Which ranks hold the parts of one whole.

    count: of parts. index: of this rank's. group: the ranks that hold one part each, in order. twins: the ranks that
    hold this part, too; None where there are no others. is_first: whether this rank is the first of its twins.
    """

    count: int
    index: int
    group: Any
    twins: Any = None
    is_first: bool = True


@dataclass(frozen=True)
class Division:
    """What `parameter.division` says of a parameter that is divided along its first axis."""

    shape: tuple[int, ...]  # of the whole
    ranks: Ranks

    @property
    def offset(self) -> int:
        """Where this rank's part begins in the whole, flattened."""
        return math.prod(self.shape) // self.ranks.count * self.ranks.index


def division_of(parameter: Tensor) -> Division | None:
    return getattr(parameter, "division", None)


@torch.no_grad()
def keep_part(parameter: nn.Parameter, ranks: Ranks) -> None:
    """Keep this rank's rows of a parameter that all ranks hold whole."""
    whole = tuple(parameter.shape)
    assert whole[0] % ranks.count == 0, (whole, ranks.count)
    rows = whole[0] // ranks.count
    parameter.data = parameter.data[ranks.index * rows : (ranks.index + 1) * rows].clone()
    parameter.division = Division(whole, ranks)  # type: ignore[attr-defined]


def whole(parameter: Tensor) -> Tensor:
    """A parameter with the rows of all ranks; its gradient goes to whose they are. Collective where it is divided."""
    division = division_of(parameter)
    return parameter if division is None else _Gathered.apply(parameter, division.ranks)


def exchanged(blocks: Tensor, ranks: Ranks | None) -> Tensor:
    """Of blocks (e, n, d), one an expert, each rank gets those of its experts, of all ranks: (e / ranks, ranks * n, d).

    Equally many on each rank. Collective, in the backward pass again.
    """
    if ranks is None:
        return blocks
    sent = _Exchanged.apply(blocks.contiguous(), ranks.group)
    return rearrange(sent, "(r e) n d -> e (r n) d", r=ranks.count)


def exchanged_back(blocks: Tensor, ranks: Ranks | None) -> Tensor:
    """The inverse of `exchanged`."""
    if ranks is None:
        return blocks
    sent = rearrange(blocks, "e (r n) d -> (r e) n d", r=ranks.count)
    return _Exchanged.apply(sent.contiguous(), ranks.group)


class _Exchanged(torch.autograd.Function):
    """The r-th of equal stretches of the first axis goes to rank r; it is its own inverse and its own gradient."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        received = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, gradient.contiguous(), group=ctx.group)
        return received, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        gathered = part.new_empty(ranks.count * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.detach().contiguous(), group=ranks.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.ranks.group)  # gloo has no reduce_scatter
        return gradient.chunk(ctx.ranks.count)[ctx.ranks.index], None
