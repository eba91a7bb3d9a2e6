"""Slow averages of networks, and running statistics that all ranks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def update_ema(pairs: Sequence[tuple[nn.Module, nn.Module]], weight: float, took: Tensor | None = None) -> None:
    """Move what the first of each pair has the share `weight` of the way to what the second has of the same names:
    parameters, and the running statistics of batch normalisation.

    An average is elementwise, so under ZeRO 3 each rank moves its own part of every parameter, and nobody is asked.
    `took`: () bool on the device, whether to move at all; None: yes.
    """
    slow, fast = [], []
    for average, followed in pairs:
        named = dict(followed.named_parameters())
        for name, old in average.named_parameters():
            for ours, theirs in zip(_held(old), _held(named[name]), strict=True):
                slow.append(ours)
                fast.append(theirs.to(ours.dtype))
        slow += running_statistics(average)
        fast += running_statistics(followed)
    if not slow:
        return
    if took is None:
        torch._foreach_lerp_(slow, fast, weight)
    else:  # slower by a kernel a tensor
        ways = {device: torch.where(took, weight, 0.0).to(device) for device in {old.device for old in slow}}
        torch._foreach_lerp_(slow, fast, [ways[old.device] for old in slow])


def _held(parameter: nn.Parameter) -> list[Tensor]:
    """What this rank has of a parameter: all of it, or under ZeRO 3 its part, and the whole of a small one as well."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return [parameter.data]
    # a small parameter stays gathered from step to step, which DeepSpeed knows by its status
    return [part.data] + ([parameter.data] if parameter.numel() == parameter.ds_numel else [])  # type: ignore[attr-defined]


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
