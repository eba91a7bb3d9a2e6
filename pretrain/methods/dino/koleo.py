"""KoLeo: features spread by drawing each away from its nearest neighbours (Sablayrolles et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data_pipelines.loader import Batch
from pretrain.engines.collectives import gathered_rows


def koleo_loss(features: Tensor, neighbours: int = 1, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance of each row (b, d) to its nearest others, so many, all of length 1, in fp32.

    The differential entropy estimator of Kozachenko and Leonenko; of one neighbour as published, of several as DINOv3
    offers it. Rows that are equal cost -log(eps) and pass on a finite gradient. Scope: the rows given.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = F.normalize(features.float(), dim=-1, eps=eps)
        with torch.no_grad():
            cosines = rows @ rows.T
            cosines.fill_diagonal_(-2.0)
            nearest = cosines.topk(neighbours, dim=1).indices if neighbours > 1 else cosines.argmax(dim=1, keepdim=True)
        others = rearrange(rows[nearest], "b k d -> (b k) d")
        own = rows.repeat_interleave(neighbours, dim=0) if neighbours > 1 else rows
        distances = F.pairwise_distance(own, others, p=2, eps=eps)
        return -(distances + eps).log().mean()


def koleo_among(own: Tensor, whole: Tensor, first: int, neighbours: int = 1) -> Tensor:
    """`koleo_loss` of all rows of a step, of which these are some.

    Args:
        own: (b, d) these rows. whole: (n, d) all rows, without a gradient. first: where in them these begin.

    Its value is that of all rows; its gradient is that of all rows through these, times n / b, so that the mean over
    equal parts of the step is the gradient of the whole.
    """
    rows = torch.cat([whole[:first], own.float(), whole[first + len(own) :]])
    value = koleo_loss(rows, neighbours)
    return value.detach() + len(whole) / len(own) * (value - value.detach())


class ClassFeatures:
    """The class features of all images of a step: of this rank's other micro-batches and of other ranks.

    A step of several micro-batches is looked at first, without gradients; of one, ranks tell each other in passing.
    """

    def __init__(self) -> None:
        self._whole: Tensor | None = None  # (v, n, d) of a step of several micro-batches
        self._looking: list[Tensor] | None = None
        self._seen = 0  # micro-batches learned from in this step

    @property
    def looking(self) -> bool:
        """Whether this pass is one that nothing is learned from."""
        return self._looking is not None

    def note(self, views: Tensor) -> None:
        """Remember features (v, b, d) of a micro-batch that is looked at."""
        assert self._looking is not None
        self._looking.append(views.detach().float())

    def begin(self, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        """Look at the micro-batches of a step, where there are several. Collective."""
        self.end()
        if len(micro_batches) == 1:
            return
        self._looking = []
        try:
            for batch in micro_batches:
                look(batch)
            self._whole = of_all_ranks(torch.cat(self._looking, dim=1))
        finally:
            self._looking = None

    def koleo(self, views: Tensor, neighbours: int) -> Tensor:
        """The sum over views of KoLeo among all images of the step, from these features (v, b, d). Collective."""
        size = views.shape[1]
        if self._whole is None:
            whole, first = of_all_ranks(views.detach().float()), _rank() * size
        else:
            whole = self._whole
            first = _rank() * (whole.shape[1] // _ranks()) + self._seen * size
            self._seen += 1
        parts = [koleo_among(own, every, first, neighbours) for own, every in zip(views, whole, strict=True)]
        return torch.stack(parts).sum()

    def end(self) -> None:
        """Forget the step."""
        self._whole, self._seen = None, 0


def of_all_ranks(views: Tensor) -> Tensor:
    """Features (v, b, d) of each rank, equally many, as (v, ranks * b, d) in the order of ranks. Collective."""
    return rearrange(gathered_rows(rearrange(views, "v b d -> b v d")), "b v d -> v b d")


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
