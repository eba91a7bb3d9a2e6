"""What an encoder adds to the loss of whichever method holds it, and tells beside it: experts that are to be balanced.

Methods don't know of it. `Method` enters `collecting` around its forward pass, an encoder calls `add` and `tell` in
its own, and what came together goes into the method's outputs. Of several passes within one (DINO's crops of two sizes)
the mean counts, each pass alike. Without `collecting`, and in evaluation, nothing is asked and nothing is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class SideLosses:
    """What came together in one forward pass of a method."""

    def __init__(self) -> None:
        self._told: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._weights: dict[str, float] = {}

    def with_outputs(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A method's `outputs` with everything told in them, and with the losses, times their weights, in "loss".

        The method's own loss is then `method_loss`.
        """
        if not self._told:
            return outputs
        means = {name: values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)
                 for name, values in self._told.items()}  # fmt: skip
        clash = means.keys() & {*outputs, "method_loss"}
        assert not clash, f"both the method and its encoder log {sorted(clash)}"
        loss = outputs["loss"]
        for name, weight in self._weights.items():
            loss = loss + weight * means[name]
        told = {name: value.detach() for name, value in means.items()}
        return {**outputs, "loss": loss, "method_loss": outputs["loss"].detach(), **told}


_collecting: ContextVar[SideLosses | None] = ContextVar("side losses", default=None)


@contextmanager
def collecting() -> Iterator[SideLosses]:
    """While it lasts, what encoders add and tell comes together."""
    found = SideLosses()
    token = _collecting.set(found)
    try:
        yield found
    finally:
        _collecting.reset(token)


def add(name: str, loss: Tensor, weight: float) -> None:
    """Have `weight` times a scalar `loss` learned from beside the method's own, and `loss` logged as `name`.

    It is a mean over the images of the pass, so that the mean over ranks and micro-batches is that of the whole batch.
    """
    found = _collecting.get()
    if found is not None:
        found._told[name].append(loss)
        found._weights[name] = weight


def tell(name: str, value: Tensor) -> None:
    """Have a scalar logged; on all ranks alike."""
    found = _collecting.get()
    if found is not None:
        found._told[name].append(value.detach())
