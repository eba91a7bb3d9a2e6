"""The mean of the gradients over the ranks, begun while the backward pass is under way (ZeRO 0 and 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Together they are few enough to be begun quickly, each large enough to fill a network.
MOST_BUCKETS = 4
LEAST_BUCKET = 2**22  # elements


@dataclass
class _Bucket:
    """Parameters that lie next to each other, and the stretch of the flat gradient that is theirs."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    stretch: Tensor | None = None
    missing: int = 0
    handle: Any = None


class GradientReduction:
    """Brings the gradients of all ranks together, in fp32 and in `MOST_BUCKETS` collectives, whatever the model.

    A bucket is sent as soon as its last gradient is there, in the same order on all ranks; the device goes on with the
    backward pass meanwhile, and nothing waits on the host. Parameters without a gradient count as zero.

    Args:
        places: Each trained parameter, and where it lies in the flat gradient.
        numel: Length of the flat gradient, of which padding stays zero.
        is_last: Whether the backward pass that runs now is the last before a step.
    """

    def __init__(
        self, places: Sequence[tuple[nn.Parameter, int]], numel: int, is_last: Callable[[], bool], world_size: int
    ) -> None:
        self._world_size, self._is_last = world_size, is_last
        first = places[0][0]
        self.flat = torch.zeros(numel, dtype=torch.float32, device=first.device)
        self._buckets = self._divide(sorted(places, key=lambda place: place[1]), numel)
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._next = 0
        self._rearm()
        for parameter, _ in places:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def finish(self) -> None:
        """Send what is left, and have the device wait for all; then every gradient is the mean over the ranks."""
        while self._next < len(self._buckets):
            self._send()
        for bucket in self._buckets:
            if bucket.handle is not None:
                bucket.handle.wait()
        self._rearm()

    def _divide(self, places: list[tuple[nn.Parameter, int]], numel: int) -> list[_Bucket]:
        """Buckets from the end of the flat gradient to its beginning: the order in which a backward pass goes."""
        enough = max(LEAST_BUCKET, -(-numel // MOST_BUCKETS))
        buckets: list[_Bucket] = []
        end = numel
        while places:
            bucket = _Bucket()
            begin = end
            while places and end - begin < enough:
                parameter, begin = places.pop()
                bucket.parameters.append(parameter)
                bucket.views.append(self.flat[begin : begin + parameter.numel()].view(parameter.shape))
            bucket.stretch = self.flat[begin:end]
            end = begin
            buckets.append(bucket)
        return buckets

    def _rearm(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.missing, bucket.handle = len(bucket.parameters), None

    def _arrived(self, parameter: Tensor) -> None:
        if not self._is_last():
            return
        self._bucket_of[id(parameter)].missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        there = [(view, p.grad) for view, p in zip(bucket.views, bucket.parameters, strict=True) if p.grad is not None]
        absent = [view for view, p in zip(bucket.views, bucket.parameters, strict=True) if p.grad is None]
        if absent:
            torch._foreach_zero_(absent)
        if there:
            torch._foreach_copy_([view for view, _ in there], [gradient for _, gradient in there])
        for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
            parameter.grad = view  # what it was is free for the rest of the backward pass
        assert bucket.stretch is not None
        if self._world_size > 1:
            bucket.stretch.div_(self._world_size)
            bucket.handle = dist.all_reduce(bucket.stretch, async_op=True)
