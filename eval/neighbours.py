"""The images nearest to others by their features, and those that have none near: no label is needed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Similarities held at once: 64 MiB of float32.
_AT_ONCE = 2**24


class Near(NamedTuple):
    """The k nearest of each of m queries, nearest first: `rows` (m, k) int64, their cosine `similarity` (m, k)."""

    rows: Tensor
    similarity: Tensor


@torch.no_grad()
def nearest(features: Tensor, queries: Tensor, k: int, own: Tensor | None = None, device: str = "cpu") -> Near:
    """Of `features` (n, d) those most like each of `queries` (m, d), by cosine; k, or all there are.

    own: (m,) the row of `features` that a query is itself, which is left out; -1 for none. Raises ValueError where
    nothing is left.
    """
    k = min(k, len(features) - (own is not None))
    if k < 1:
        raise ValueError(f"{len(features)} images and as neighbours of one another none; two are needed at least")
    among = F.normalize(features.to(device).float(), dim=1)
    rows, similarities = [], []
    size = max(1, _AT_ONCE // len(among))
    for begin in range(0, len(queries), size):
        similarity = F.normalize(queries[begin : begin + size].to(device).float(), dim=1) @ among.T
        if own is not None:
            mine = own[begin : begin + size].to(device)
            known = mine >= 0
            similarity[known.nonzero()[:, 0], mine[known]] = -torch.inf
        best = similarity.topk(k, dim=1)
        rows.append(best.indices.cpu())
        similarities.append(best.values.cpu())
    return Near(torch.cat(rows), torch.cat(similarities))


def least_typical(features: Tensor, k: int, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The rows of the `count` images whose k nearest others are farthest on average, farthest first, and their mean
    cosine similarity to these."""
    near = nearest(features, features, k, torch.arange(len(features)), device)
    mean = near.similarity.mean(dim=1)
    order = mean.argsort(stable=True)[:count]
    return order, mean[order]
