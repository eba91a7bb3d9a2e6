"""What all ranks tell each other of a step, and how late each hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.loader import Loader
from pretrain.checkpoints.saving import Saver
from pretrain.diagnostics import Diagnostics
from pretrain.engines.collectives import Gathering, begin_all_gather_scalars
from pretrain.step_control import StepControl
from pretrain.tracking.step_clock import StepClock


class _Told(NamedTuple):
    """What this rank has told the others of a step."""

    step: int  # from 0
    row: Gathering
    metrics: tuple[str, ...]  # of which the mean over the ranks counts
    phase: int  # of saving, in which it was told


class Agreement:
    """One row of numbers of every rank each step, which nobody waits for.

    A step is heard of when the next one is about to change the weights, and the device has its forward and backward
    pass still before it; or at once, where something is written down after the step. So bears one step's delay

    - a stop request: the run ends a step later, and saves that;
    - the end of a save: the checkpoint gets its name a step later;
    - an alarm of `diagnostics.stop_on`: the run ends a step later, without a checkpoint as before;
    - a step that is not finite: the optimizer has left it out by itself where its gradients were; it is named, or
      the run ended, before the next step changes the weights, and before anything is saved.

    summary: the step last heard of, in numbers that hold for all ranks. stopping: whether a rank was asked to stop.
    """

    def __init__(
        self,
        loader: Loader,
        saver: Saver,
        control: StepControl,
        diagnostics: Diagnostics,
        clock: StepClock,
        device: torch.device,
    ) -> None:
        self._loader, self._saver, self._control, self._diagnostics = loader, saver, control, diagnostics
        self._clock, self._device = clock, device
        self._told: _Told | None = None  # what is not heard yet
        self.summary: dict[str, float] = {}
        self.stopping = False

    def tell(self, step: int, metrics: Mapping[str, Tensor | float], digest: int, stop: bool) -> None:
        """Begin to tell the other ranks of optimizer step `step` (from 0), which has just been enqueued. Collective.

        Beside its metrics each tells whether it was asked to stop, the bad samples it met since the start, a digest of
        the ids that it really saw (a proof of the order of data), how far its saving is, and what diagnostics ask for.
        """
        own = {"stop": float(stop), "bad_samples": float(self._loader.num_bad), "ids_digest": float(digest)}
        own |= {"saving": self._saver.status} | self._diagnostics.signals()
        row = begin_all_gather_scalars({**metrics, **own}, self._device)
        self._told = _Told(step, row, tuple(metrics), self._saver.phase)

    def hear(self) -> None:
        """Take in what all ranks told of the last step, if that has not been done.

        Raises what `StepControl.counts` and `Saver.hear` do, on all ranks alike.
        """
        if self._told is None:
            return
        told, self._told = self._told, None
        with self._clock.part("waiting"):
            agreed = told.row.read()
        self.stopping = self.stopping or agreed.any("stop")
        self._saver.hear(agreed.by_rank["saving"], told.phase)
        self.summary = {name: agreed.mean(name) for name in told.metrics}
        self.summary["grad_norm"] = agreed.by_rank["grad_norm"][0]  # the same on all of them
        self.summary["ids_digest"] = int(agreed.total("ids_digest")) % 2**32
        self.summary["bad_samples"] = int(agreed.total("bad_samples"))
        if self._control.counts(told.step, agreed):
            self._diagnostics.record(told.step, agreed, self.summary["grad_norm"])
