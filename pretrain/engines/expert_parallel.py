"""Experts divided over ranks (ZeRO 0): who holds which, and the mean of their gradients.

A rank sends tokens to whom their experts belong, so that an expert's gradient comes from all ranks of its group by
itself; what is left is the sum over the groups, and the division by the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from pretrain.config.load import ConfigError
from pretrain.encoders.divided import Ranks, division_of


def divide_experts(module: nn.Module) -> None:
    """Leave each rank its experts, of a module that is whole and the same on all ranks. Collective.

    As many ranks share the experts as divide both their number and that of the ranks; ConfigError where that is one.
    """
    layers = [part for part in module.modules() if hasattr(part, "divide")]
    world_size, num = dist.get_world_size(), math.gcd(*(layer.num_experts for layer in layers))
    count = math.gcd(world_size, num)
    if world_size == 1:
        return
    if count == 1:
        raise ConfigError(
            f"engine.expert_parallel divides {num} experts over the ranks, and no number but 1 divides both them and "
            f"{world_size} ranks; take such a number of ranks, or set engine.expert_parallel=false"
        )
    ranks = _ranks(count, world_size)
    for layer in layers:
        layer.divide(ranks)


def _ranks(count: int, world_size: int) -> Ranks:
    """Groups of `count` neighbours, which share a node's fast connections. All ranks make all groups."""
    rank = dist.get_rank()
    groups = [dist.new_group([*range(first, first + count)]) for first in range(0, world_size, count)]
    twins = None
    if world_size > count:
        every = [dist.new_group([*range(index, world_size, count)]) for index in range(count)]
        twins = every[rank % count]
    return Ranks(count, rank % count, groups[rank // count], twins, is_first=rank < count)


@torch.no_grad()
def finish_experts(parameters: Iterable[nn.Parameter]) -> None:
    """Bring the gradients of a step to the mean over all ranks; one that has none counts as zero. Collective."""
    for parameter in parameters:
        division = division_of(parameter)
        assert division is not None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad /= dist.get_world_size()
        if division.ranks.twins is not None:
            dist.all_reduce(parameter.grad, group=division.ranks.twins)
