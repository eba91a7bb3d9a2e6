"""Norms of a method's weights and the distance of its slow averages, whichever rank holds which piece of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.encoders.divided import Division, division_of
from pretrain.methods.base import Method


@torch.no_grad()
def weight_statistics(method: Method, device: torch.device) -> dict[str, float]:
    """What the weights of all ranks say. Collective.

    weight_norm: of all trained parameters together. teacher_distance: norm of the difference of slow averages and
    what they follow, relative to the norm of the latter; teacher_sum: a sum over the averages that changes when they
    do. The last two where the method has averages.
    """
    everywhere, parts = torch.zeros(2, 4, dtype=torch.float64, device=device)  # of what all ranks hold, or others
    divided: Division | None = None
    averages = method.ema_pairs()
    for parameter in method.parameters():
        divided = division_of(parameter) or divided
        if parameter.requires_grad:
            sums = everywhere if division_of(parameter) is None else parts
            sums[0] += piece_of(parameter).double().square().sum()
    for slow, fast in averages:
        followed = dict(fast.named_parameters())
        for name, parameter in slow.named_parameters():
            sums = everywhere if division_of(parameter) is None else parts
            old, new = piece_of(parameter).float(), piece_of(followed[name]).float()
            sums[1] += (old - new).double().square().sum()
            sums[2] += new.double().square().sum()
            sums[3] += old.double().sum()
    if any(hasattr(p, "ds_tensor") for p in method.parameters()):  # else every rank has counted everything
        dist.all_reduce(everywhere)
    if divided is not None:
        dist.all_reduce(parts, group=divided.ranks.group)
    trained, apart, followed_norm, total = (everywhere + parts).tolist()
    found = {"weight_norm": trained**0.5}
    if averages:
        found |= {"teacher_distance": (apart / max(followed_norm, 1e-30)) ** 0.5, "teacher_sum": total}
    return found


def piece_of(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, but under ZeRO 3, whose last pieces end in padding."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    held = parameter.ds_tensor
    left = parameter.ds_numel - dist.get_rank() * held.numel()
    return held.flatten()[: max(left, 0)]
