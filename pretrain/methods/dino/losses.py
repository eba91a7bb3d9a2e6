"""The terms of DINO's and DINOv2's loss, and how a teacher's outputs become targets."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum
from torch import Tensor


def dino_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy between all (teacher view, student view) pairs but those of the same view, averaged over pairs.

    student (v, b, k): outputs divided by the student's temperature, global views first. teacher (g, b, k):
    probabilities. Gives a scalar, in fp32 under autocast too (Caron et al. 2021, equation 3).
    """
    log_student = student.float().log_softmax(dim=-1)
    num_teacher, batch = teacher.shape[:2]
    with torch.autocast(student.device.type, enabled=False):  # it takes an einsum for a layer's product
        # the sum over views first: no tensor of all pairs is ever made
        every = einsum(teacher.float().sum(dim=0), log_student.sum(dim=0), "b k, b k ->")
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


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance of each row (b, d) to its nearest other row, all of length 1, in fp32.

    The differential entropy estimator of Kozachenko and Leonenko (Sablayrolles et al. 2019). Rows that are equal cost
    -log(eps) and pass on a finite gradient. Scope: the rows given, that is this rank's micro-batch.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = F.normalize(features.float(), dim=-1, eps=eps)
        with torch.no_grad():
            cosines = rows @ rows.T
            cosines.fill_diagonal_(-2.0)
            nearest = cosines.argmax(dim=1)
        distances = F.pairwise_distance(rows, rows[nearest], p=2, eps=eps)
        return -(distances + eps).log().mean()


@torch.no_grad()
def sinkhorn_knopp(outputs: Tensor, temperature: float, iterations: int) -> Tensor:
    """Teacher outputs (n, k) of this rank to probabilities (n, k) that use all prototypes equally over all ranks.

    Scope: the rows of this call on all ranks, whose numbers may differ (Caron et al. 2020, appendix A.1). Collective:
    all ranks call it.
    """
    scores = outputs.float() / temperature
    # each row relative to its own largest: at temperatures of .02 one that is far below another is lost in fp32.
    # The rows' weights matter until they are first normalised; relative to the largest of all ranks, as they are summed
    top = scores.amax(dim=1, keepdim=True)
    largest = top.max() if len(top) else top.new_tensor(-torch.inf)
    count = scores.new_tensor(float(len(scores)))
    _over_ranks(largest, dist.ReduceOp.MAX)
    _over_ranks(count, dist.ReduceOp.SUM)
    table, weights = (scores - top).exp(), (top - largest).exp()
    num_prototypes = outputs.shape[1]
    for iteration in range(iterations):
        columns = (table if iteration else table * weights).sum(dim=0, keepdim=True)
        _over_ranks(columns, dist.ReduceOp.SUM)
        table = table / (columns * num_prototypes).clamp_min(1e-30)
        table = table / (table.sum(dim=1, keepdim=True) * count)
    return table * count


def _over_ranks(value: Tensor, operation: dist.ReduceOp) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, operation)
