"""A teacher's features of the images of the last steps, which stand for classes that nobody has named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.engines.collectives import gathered_rows


class FeatureQueue(nn.Module):
    """`rows` (size, d) fp32 unit vectors, the newest first, of which the first `filled` () are there.

    All ranks hold the same: of each step all images, in the order of the global batch. So nothing depends on how a step
    is divided, and a resumed run goes on with the same.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._noted: list[Tensor] = []  # of this rank's micro-batches since the last step

    def note(self, features: Tensor) -> None:
        """Remember unit vectors (b, d) of a micro-batch for the `push` that ends the step."""
        self._noted.append(features.detach())

    @torch.no_grad()
    def push(self) -> None:
        """Put what was noted on all ranks in front; what is oldest goes. Collective, where there is any."""
        if not self._noted:
            return
        fresh = gathered_rows(torch.cat(self._noted))
        self._noted.clear()
        size = len(self.rows)
        self.rows.copy_(torch.cat([fresh, self.rows])[:size])
        self.filled.add_(len(fresh)).clamp_(max=size)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """While it lasts, nothing that is noted is kept."""
        kept = list(self._noted)
        try:
            yield
        finally:
            self._noted[:] = kept

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far the student's likeness to the rows is from the teacher's: the mean Kullback-Leibler divergence of
        softmaxes over them, of unit vectors (b, d) each, in nats."""
        there = torch.arange(len(self.rows), device=student.device) < self.filled.clamp_min(1)
        with torch.autocast(student.device.type, enabled=False):
            ours, theirs = (
                (features.float() @ self.rows.T / temperature).masked_fill(~there, -1e9).log_softmax(dim=-1)
                for features in (student, teacher)
            )
            return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
