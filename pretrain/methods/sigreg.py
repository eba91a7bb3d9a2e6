"""SIGReg: how far rows are from a standard normal cloud, seen along random directions.

Sketched isotropic Gaussian regularisation (Balestriero and LeCun 2025, LeJEPA, section 4): along each direction the
Epps-Pulley statistic compares the rows' empirical characteristic function with that of N(0, 1).

The function of ALL rows is a mean over them, so that ranks and micro-batches need only tell each other their means: the
loss is then that of the whole batch, and so is the mean over ranks and micro-batches of its gradients.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from data_pipelines.rng import Purpose, random_bits, stream_key
from pretrain.encoders.tables import built_once
from pretrain.stream.from_host import from_host


def directions(seed: int, step: int, dim: int, count: int, device: torch.device) -> Tensor:
    """(dim, count) fp32 unit columns, uniform over the sphere: a function of (seed, step), alike on every rank."""
    bits = random_bits(stream_key(seed, Purpose.SLICES, step), dim * count)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0 nor 1
    drawn = torch.from_numpy(2 * uniform - 1).erfinv()
    columns = rearrange(drawn, "(d k) -> d k", d=dim)
    return from_host((columns / columns.norm(dim=0)).float().numpy(), device)


@built_once
def knots(start: float, end: float, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where characteristic functions are compared, (t) each: the places, that of N(0, 1) there, and the weights of the
    trapezoid rule times exp(-t^2 / 2). From a `start` of 0 the other half of the line counts as well."""
    places = torch.linspace(start, end, count, dtype=torch.float32, device=device)
    normal = (-places.square() / 2).exp()
    step = (end - start) / (count - 1) * (2.0 if start == 0 else 1.0)
    weights = torch.full((count,), step, device=device)
    weights[0] = weights[-1] = step / 2
    return places, normal, weights * normal


def waves(rows: Tensor, slices: Tensor, places: Tensor) -> Tensor:
    """(..., 2, k, t) fp32: means over the rows (..., n, d) of the cosine and sine of t times their projections on the
    directions (d, k): their empirical characteristic function."""
    with torch.autocast(rows.device.type, enabled=False):
        phases = rearrange(rows.float() @ slices, "... n k -> ... n k 1") * places
        return torch.stack([phases.cos().mean(dim=-3), phases.sin().mean(dim=-3)], dim=-3)


def over_ranks(means: Tensor) -> Tensor:
    """The mean of equally many rows on each rank, without a gradient. Collective."""
    means = means.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return means


def epps_pulley(own: Tensor, whole: Tensor, normal: Tensor, weights: Tensor, count: float = 1.0) -> Tensor:
    """(..., k) the statistic along each direction.

    Args:
        own: (..., 2, k, t) `waves` of these rows. whole: the same of all rows, without a gradient.
        normal, weights: (t) of `knots`.
        count: Of all rows, by which LeJEPA multiplies (its test statistic); 1: not (DINOv3's FINO).

    Its value is that of all rows; its gradient is that of all rows through these.
    """
    wanted = torch.stack([normal, torch.zeros_like(normal)])
    gap = whole - rearrange(wanted, "c t -> c 1 t")
    value = gap.square() + 2 * gap * (own - own.detach())  # own is one of equal shares of the mean that `whole` is
    return count * (value.sum(dim=-3) * weights).sum(dim=-1)
