"""Whether a step counts: left out, or the end of the run, where values are not finite or an alarm stands too long."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.files import write_json
from data_pipelines.loader import Batch, Loader
from pretrain.checkpoints.folder import CheckpointFolder
from pretrain.config import ALARMS, Config
from pretrain.diagnostics.non_finite import (
    TroubleError,
    check_finite,
    find_in_backward,
    find_in_forward,
    find_in_weights,
    in_words,
    samples_of,
    what_is_wrong,
)
from pretrain.diagnostics.watch import Diagnostics
from pretrain.encoders.drop_path import drawn
from pretrain.engines.collectives import GatheredScalars, all_gather_objects
from pretrain.methods.base import Method
from pretrain.stream.batches import seed_dropout, to_device
from pretrain.survival.history import try_record


class StepControl:
    """What the training loop asks after each step, on all ranks alike.

    `settle` waits, on all ranks, for the checkpoint that is still being written.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        method: Method,
        loader: Loader,
        diagnostics: Diagnostics,
        device: torch.device,
        rank: int,
        settle: Callable[[], None],
    ) -> None:
        self.config, self.settings, self.folder = config, config.diagnostics, folder
        self.method, self.loader, self.diagnostics = method, loader, diagnostics
        self.device, self.rank, self.settle = device, rank, settle
        self.kept: dict[int, list[Tensor]] = {}  # by step: the method's buffers before it

    @property
    def skipped(self) -> set[int]:
        """Steps (from 1) that were left out, in all lives of the run."""
        return self.diagnostics.skipped

    def before_step(self, step: int) -> None:
        """Remember, of this step and the one before, what a step that is not finite must not have changed: one rank's
        NaN is in every rank's centre by the time that it is heard of."""
        self.kept = {step: [buffer.clone() for buffer in self.method.buffers()], **self.kept}
        for old in [old for old in self.kept if old < step - 1]:
            del self.kept[old]

    def took(self, grad_norm: Tensor) -> Tensor | None:
        """() bool on the device: whether the optimizer took the step; None where no step may be left out."""
        return grad_norm.isfinite() if self.settings.skip_non_finite else None

    @torch.no_grad()
    def after_step(self, step: int, took: Tensor | None) -> None:
        """Undo what a step that was left out has done to buffers; nobody asks the device whether it was."""
        if took is not None:
            for buffer, kept in zip(self.method.buffers(), self.kept[step], strict=True):
                buffer.copy_(torch.where(took, buffer, kept))

    def counts(self, step: int, agreed: GatheredScalars) -> bool:
        """Whether optimizer step `step` (from 0) was taken, or left out for its gradients; the same on all ranks.

        Heard of a step late, when the weights are still those that the step has left.

        Raises NonFiniteError where values are not finite and the step may not be left out, and TroubleError where an
        alarm of `stop_on` has stood for too long: on every rank alike.
        """
        losses, grad_norm = agreed.by_rank["loss"], agreed.by_rank["grad_norm"][0]
        wrong = what_is_wrong(losses, grad_norm, step + 1)
        if wrong is not None:
            return self._lost(step, losses, grad_norm, wrong)
        trouble = int(max(agreed.by_rank["trouble"]))
        if trouble:
            self.settle()
            raise self._trouble(ALARMS[trouble - 1])
        return True

    def _trouble(self, name: str) -> TroubleError:
        """What to raise for an alarm, and which checkpoint is from before it."""
        stands = self.diagnostics.alarms.standing.get(name)  # on rank 0
        if stands is None:
            return TroubleError(f"alarm {name}", name)
        paths = CheckpointFolder(self.folder, self.config.checkpoint).all()
        before = [path for path in paths if int(path.name[5:]) < stands.since]
        good = f"the last checkpoint from before is {before[-1]}" if before else "no checkpoint is from before"
        return TroubleError(
            f"{name}, since step {stands.since}: {stands.text}. diagnostics.stop_on names it, so the run ends, without "
            f"a checkpoint; {good}. Start a run of its own (name=...), or go on with this one without it in stop_on",
            f"{name}: {stands.text}",
        )

    def _lost(self, step: int, losses: list[float], grad_norm: float, wrong: str) -> bool:
        """Name the layer; leave the step out if that is allowed, else raise."""
        findings = self._find(step)
        # of several, one whose own loss it was
        found = [rank for rank, finding in enumerate(findings) if finding]
        rank = min(found, key=lambda rank: (math.isfinite(losses[rank]), rank), default=None)
        told = "" if rank is None else f"; on rank {rank}: {in_words(findings[rank])}"
        # with gradients that are not finite, neither weights nor moments have changed, in any ZeRO stage
        may_skip = not math.isfinite(grad_norm)
        skips = may_skip and len(self.skipped | {step + 1}) <= self.settings.skip_non_finite
        if self.rank == 0:
            place = self.folder / "non_finite" / f"step-{step + 1:08d}.json"
            facts = {"step": step + 1, "what": wrong, "loss_of_rank": [str(loss) for loss in losses]}
            by_rank = {str(number): finding for number, finding in enumerate(findings) if finding}
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_json(place, {**facts, "grad_norm": str(grad_norm), "skipped": skips, "rank": by_rank})
                told += f" (more in {place})"
            except OSError as error:  # a full disk is no reason to leave the other ranks waiting
                told += f" ({place} can't be written: {error})"
            try_record(
                self.folder, "alarm", step=step + 1, name="non_finite", text=wrong + told, begins=True, skipped=skips
            )
        if not skips:
            self.settle()
            last = [str(path) for path in CheckpointFolder(self.folder, self.config.checkpoint).all()[-1:]]
            check_finite(losses, grad_norm, step + 1, *(last or [None]), found=told)
        self.skipped.add(step + 1)
        if self.rank == 0:
            left = self.settings.skip_non_finite - len(self.skipped)
            print(f"ALARM non_finite: {wrong}{told}; the step is left out, {left} more may be", flush=True)
        return False

    def _find(self, step: int) -> list[dict[str, Any] | None]:
        """What each rank finds by running its micro-batches once more, as it was before the step and with the same
        seeds; it is as it was afterwards. Collective."""
        now = [buffer.clone() for buffer in self.method.buffers()]
        with self.method.forgetting():
            self._put(self.kept.get(step, now))
            found = self._run_again(step, self._batches(step))
        self._put(now)
        return found

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.method.buffers(), values, strict=True):
            buffer.copy_(value)

    def _batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, made once more: the loader's memory has other ones by now."""
        loader, number = self.loader, self.loader.grad_accum_steps
        batch = loader.rows(step, range(loader.first_row, loader.first_row + loader.num_rows))
        parts = {name: field.chunk(number) for name, field in batch.items()}
        batches = [
            to_device({name: chunks[position] for name, chunks in parts.items()}, self.device)
            for position in range(number)
        ]
        with torch.no_grad():
            self.method.before_step(step, batches, lambda batch: self.method(batch, step))
        return batches

    def _run_again(self, step: int, micro_batches: list[Batch]) -> list[dict[str, Any] | None]:
        weights = find_in_weights(self.method)
        findings = all_gather_objects(self._first(find_in_forward, step, micro_batches, gradients=False), self.device)
        if not any(findings) and weights is None:
            findings = all_gather_objects(
                self._first(find_in_backward, step, micro_batches, gradients=True), self.device
            )
        every_weights = all_gather_objects(weights, self.device)
        return [
            finding if own is None else {**own, **(finding or {}), "weights": own["parameters"]}
            for finding, own in zip(findings, every_weights, strict=True)
        ]

    def _first(self, find: Any, step: int, micro_batches: list[Batch], gradients: bool) -> dict[str, Any] | None:
        """What `find` says of the first of this rank's micro-batches of which it says something."""
        first, precision = None, self.config.engine.precision
        options = {"whole": self.config.engine.zero_stage < 3} if gradients else {}
        for position, batch in enumerate(micro_batches):

            def run(batch: Batch = batch, position: int = position) -> dict[str, Tensor]:
                seed_dropout(self.config.seed, step, self.rank, position)
                with (
                    torch.autocast(self.device.type, torch.bfloat16, enabled=precision != "fp32"),
                    drawn(self.config.seed, step, batch["rows"]),
                ):
                    return self.method(batch, step)

            try:
                with torch.set_grad_enabled(gradients):
                    found = find(self.method, run, **options)  # of all: under ZeRO 3 each is collective
            except torch.OutOfMemoryError:  # it keeps more than a step does
                if self.config.engine.zero_stage == 3:
                    raise
                found = None
            if found and first is None:
                first = {**found, "micro_batch": position, "samples": samples_of(batch, self._key_of)}
        return first

    def _key_of(self, dataset: int, sample: int) -> tuple[str, str]:
        key, shard = self.loader.sampler.datasets[dataset].key(sample)
        return key, str(getattr(shard, "name", shard))
