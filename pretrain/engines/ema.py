"""Slow averages of networks, and running statistics that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

#: `with gathered(parameters):` makes them whole and writable on every rank (ZeRO 3 keeps a piece on each; otherwise
#: it does nothing). What is written must be equal on all ranks.
Gathered = Callable[[Iterable[nn.Parameter]], AbstractContextManager[None]]


@contextmanager
def already_whole(_: Iterable[nn.Parameter]) -> Iterator[None]:
    """The `Gathered` of a model whose parameters are not partitioned."""
    yield


@torch.no_grad()
def update_ema(slow: nn.Module, fast: nn.Module, weight: float, gathered: Gathered = already_whole) -> None:
    """Move what `slow` has the share `weight` of the way to what `fast` has of the same names: parameters, and the
    running statistics of batch normalisation."""
    followed = dict(fast.named_parameters())
    for name, old in slow.named_parameters():
        new = followed[name]
        with gathered([old, new]):
            old.lerp_(new.to(old.dtype), weight)
    for old, new in zip(running_statistics(slow), running_statistics(fast), strict=True):
        old.lerp_(new, weight)


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of a module's batch normalisations, in order."""
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    return [statistic for layer in layers for statistic in (layer.running_mean, layer.running_var)]


@torch.no_grad()
def share_running_statistics(module: nn.Module) -> None:
    """Replace running statistics by their mean over the ranks, so that all ranks hold one model. Collective."""
    statistics = running_statistics(module)
    if not statistics or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat(statistics)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for statistic, mean in zip(statistics, flat.split([len(part) for part in statistics]), strict=True):
        statistic.copy_(mean)
