"""A run's pictures: the same images at every step, so that what changes is what was learned."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.buffers import map_batch
from data_pipelines.loader import Batch
from data_pipelines.sampler import Sampler
from pretrain.config import Config
from pretrain.engines.engine import whole_state_dict
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.registry import build_method
from pretrain.stream.batches import crop_sheet, to_device
from pretrain.stream.loading import loader_of
from pretrain.stream.native_batch import canvases

NUM_IMAGES = 8


class Drawing:
    """What is drawn of a run. The method is shown the first images of the run's first step, with the crops and masks
    that they had there: the same for all ranks, however many there are, and after every resume."""

    def __init__(self, config: Config, normalisation: Normalisation, device: torch.device) -> None:
        self.config, self.normalisation, self.device = config, normalisation, device
        self._shown: Batch | None = None
        self._copy: Method | None = None

    @torch.no_grad()
    def pictures(self, engine: Any, method: Method, sampler: Sampler, batch: Batch) -> dict[str, Tensor]:
        """Named pictures (n, c, h, w) uint8: the crops of the present `batch`, and the method's of the images that
        are always shown. Called by all ranks, for the first one's sake; leaves the method as it was."""
        present = first_rows(self._dense(batch))
        if self._shown is None:
            self._shown = self._make(sampler, present)
        crops = {"crops (global, then local)": crop_sheet(present, method.show)}
        if self.config.engine.zero_stage == 3 or self.config.engine.expert_parallel:
            return crops | self._of_a_copy(method)
        engine.eval()
        try:
            return crops | method.pictures(self._shown)
        finally:
            engine.train()

    def _of_a_copy(self, method: Method) -> dict[str, Tensor]:
        """The pictures by a method that is whole, on the first rank's host: ZeRO 3 fetches parameters in the order in
        which training used them, and fails at a forward pass that uses others."""
        weights = whole_state_dict(method)  # collective
        if dist.get_rank() != 0:
            return {}
        if self._copy is None:
            with torch.random.fork_rng(devices=[]):
                self._copy = build_method(self.config, self.normalisation, method.timeline).eval()
        self._copy.load_state_dict(weights)
        assert self._shown is not None
        return self._copy.pictures(map_batch(self._shown, Tensor.cpu))

    def _dense(self, batch: Batch) -> Batch:
        """A batch with its crops on canvases of one size, where they keep their own shape."""
        patch = self.config.views.global_crops[0].patch
        if patch is None:
            return batch
        return {"rows": batch["rows"], **canvases(batch, self.config.data.channels, patch)}

    def _make(self, sampler: Sampler, present: Batch) -> Batch:
        """By a loader of its own: what it finds bad was counted when it was learned from."""
        try:
            with loader_of(self.config, sampler, workers=0, threads=1) as loader:
                return to_device(loader.rows(0, range(min(NUM_IMAGES, sampler.batch_size))), self.device)
        except (OSError, ValueError, LookupError) as error:  # no reason not to train
            print(f"the first step's images can't be read again ({error}); drawing those of this step", flush=True)
            return map_batch(present, torch.clone)


def first_rows(batch: Batch) -> Batch:
    """The first few rows of a micro-batch."""
    return map_batch(batch, lambda tensor: tensor[:NUM_IMAGES] if tensor.ndim else tensor)
