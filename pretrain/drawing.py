"""A run's pictures: the same images at every step, so that what changes is what was learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data_pipelines.buffers import map_batch
from data_pipelines.loader import Batch
from data_pipelines.sampler import Sampler
from pretrain.batches import crop_sheet, to_device
from pretrain.data import loader_of
from pretrain.methods import Method
from pretrain.schema import Config

NUM_IMAGES = 8


class Drawing:
    """What is drawn of a run. The method is shown the first images of the run's first step, with the crops and masks
    that they had there: the same for all ranks, however many there are, and after every resume."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self._shown: Batch | None = None

    def pictures(self, engine: Any, method: Method, sampler: Sampler, batch: Batch) -> dict[str, Tensor]:
        """Named pictures (n, c, h, w) uint8: the crops of the present `batch`, and the method's of the images that
        are always shown. Called by all ranks; leaves the method as it was."""
        present = first_rows(batch)
        if self._shown is None:
            self._shown = self._make(sampler, present)
        engine.eval()
        try:
            with torch.no_grad(), _forward_as(method, method.pictures):
                pictures = engine(self._shown)
        finally:
            engine.train()
        return {"crops (global, then local)": crop_sheet(present, method.show), **pictures}

    def _make(self, sampler: Sampler, present: Batch) -> Batch:
        """By a loader of its own: what it finds bad was counted when it was learned from."""
        try:
            with loader_of(self.config, sampler, threads=1) as loader:
                return to_device(loader.rows(0, range(min(NUM_IMAGES, sampler.batch_size))), self.device)
        except (OSError, ValueError, LookupError) as error:  # no reason not to train
            print(f"the first step's images can't be read again ({error}); drawing those of this step", flush=True)
            return map_batch(present, torch.clone)


@contextmanager
def _forward_as(method: Method, call: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, `call` is what the engine runs: ZeRO 3 has a parameter whole within the engine's forward only."""
    method.forward = call  # of this object, before that of its class
    try:
        yield
    finally:
        del method.forward


def first_rows(batch: Batch) -> Batch:
    """The first few rows of a micro-batch."""
    return map_batch(batch, lambda tensor: tensor[:NUM_IMAGES] if tensor.ndim else tensor)
