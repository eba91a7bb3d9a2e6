"""The terms of DINO's and DINOv2's loss, and how a teacher's outputs become targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum
from torch import Tensor


def dino_loss(student: Tensor, teacher: Tensor, local_weight: float = 1.0) -> Tensor:
    """Cross-entropy between all (teacher view, student view) pairs but those of the same view, averaged over pairs.

    student (v, b, k): outputs divided by the student's temperature, global views first. teacher (g, b, k):
    probabilities. Gives a scalar, in fp32 under autocast too (Caron et al. 2021, equation 3). `local_weight` multiplies
    the pairs of local views, which are counted as before (Simeoni et al. 2025, section 4).
    """
    log_student = student.float().log_softmax(dim=-1)
    num_teacher, batch = teacher.shape[:2]
    with torch.autocast(student.device.type, enabled=False):  # it takes an einsum for a layer's product
        # the sum over views first: no tensor of all pairs is ever made
        seen = log_student.sum(dim=0)
        if local_weight != 1.0:
            seen = log_student[:num_teacher].sum(dim=0) + local_weight * log_student[num_teacher:].sum(dim=0)
        every = einsum(teacher.float().sum(dim=0), seen, "b k, b k ->")
        same = einsum(teacher.float(), log_student[:num_teacher], "g b k, g b k ->")
    num_pairs = num_teacher * (len(student) - 1)
    return (same - every) / (num_pairs * batch)


def ibot_loss(student: Tensor, teacher: Tensor, weights: Tensor, num_crops: int) -> Tensor:
    """Cross-entropy between teacher and student at the hidden tokens, as DINOv2 weighs it (Oquab et al. 2024).

    student (n, k): outputs divided by the student's temperature. teacher (n, k): probabilities. weights (n,): 1 over
    the number of hidden tokens of the token's crop. The sum is divided by the number of all global crops, hidden or
    not, which every micro-batch has alike. In fp32 under autocast too.
    """
    with torch.autocast(student.device.type, enabled=False):
        entropies = einsum(teacher.float(), student.float().log_softmax(dim=-1), "n k, n k -> n")
        return -(entropies * weights).sum() / num_crops


@torch.no_grad()
def moved_center(center: Tensor, total: Tensor, count: Tensor, momentum: float) -> Tensor:
    """A centre (1, k) moved to the mean of `count` () teacher outputs that sum to `total` (k); it stays for none."""
    moved = (center * momentum).add_(total / count.clamp_min(1), alpha=1 - momentum)
    return torch.where(count > 0, moved, center)


@torch.no_grad()
def sinkhorn_knopp(outputs: Tensor, temperature: float, iterations: int) -> Tensor:
    """Teacher outputs (n, k) of this rank to probabilities (n, k) that use all prototypes equally over all ranks.

    Scope: the rows of this call on all ranks, whose numbers may differ (Caron et al. 2020, appendix A.1). Collective:
    all ranks call it.
    """
    return sinkhorn_tables([outputs], temperature, iterations)[0]


@torch.no_grad()
def sinkhorn_tables(tables: Sequence[Tensor], temperature: float, iterations: int) -> list[Tensor]:
    """`sinkhorn_knopp` of several outputs (n_i, k_i), each by itself, in the collectives of one."""
    scores = [outputs.float() / temperature for outputs in tables]
    # each row relative to its own largest: at temperatures of .02 one that is far below another is lost in fp32.
    # The rows' weights matter until they are first normalised; relative to the largest of all ranks, as they are summed
    tops = [part.amax(dim=1, keepdim=True) for part in scores]
    lowest = torch.finfo(torch.float32).min  # of no row at all
    largest = torch.stack([F.pad(top.flatten(), (0, 1), value=lowest).amax() for top in tops])
    _over_ranks(largest, dist.ReduceOp.MAX)
    shares = [(part - top).exp() for part, top in zip(scores, tops, strict=True)]
    weights = [(top - most).exp() for top, most in zip(tops, largest, strict=True)]
    rows = torch.cat([torch.full((1,), float(len(part)), device=part.device) for part in scores])
    sizes = [part.shape[1] for part in shares]
    for iteration in range(iterations):
        weighed = shares if iteration else [part * weight for part, weight in zip(shares, weights, strict=True)]
        sums = [part.sum(dim=0) for part in weighed]
        joined = torch.cat(sums if iteration else [*sums, rows])  # rows are counted once
        _over_ranks(joined, dist.ReduceOp.SUM)
        if not iteration:
            rows = joined[-len(shares) :]
        for number, columns in enumerate(joined[: sum(sizes)].split(sizes)):
            share = shares[number] / (columns * sizes[number]).clamp_min(1e-30)
            shares[number] = share / (share.sum(dim=1, keepdim=True) * rows[number])
    return [share * count for share, count in zip(shares, rows, strict=True)]


def _over_ranks(value: Tensor, operation: dist.ReduceOp) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, operation)
