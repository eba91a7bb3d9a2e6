"""The training loop: the same on one CPU process and on many GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.datasets.bad_samples import BadSampleLog
from data_pipelines.loader import Batch
from data_pipelines.retry import patiently
from data_pipelines.sampler import Sampler
from data_pipelines.wording import counted
from pretrain.checkpoints.exports import Export, export_of
from pretrain.checkpoints.folder import FORM, CheckpointFolder, ResumeState, check_resume
from pretrain.checkpoints.saving import NotSavedError, Saver, last_of_all
from pretrain.config import Config
from pretrain.diagnostics import Diagnostics, knn_line
from pretrain.encoders.drop_path import drawn
from pretrain.engines import live_state
from pretrain.engines.collectives import Gathering, begin_all_gather_scalars
from pretrain.engines.engine import build_engine, optimizer_of
from pretrain.engines.optim import set_rates
from pretrain.engines.schedules import Timeline, check_warmup, learning_rate, weight_decay
from pretrain.interop.initialise import start_from
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.registry import build_method, spec_of
from pretrain.step_control import StepControl
from pretrain.stream import masking
from pretrain.stream.batches import DeviceSteps, seed_dropout
from pretrain.stream.growth import continued, pin
from pretrain.stream.loading import check_ranks_agree, loader_of
from pretrain.survival.startup import StartUp
from pretrain.survival.stopping import StopRequest
from pretrain.survival.watchdog import Watchdog
from pretrain.tracking.drawing import Drawing
from pretrain.tracking.progress import Watched, Window, memory_gb, progress_line
from pretrain.tracking.system_metrics import SystemMetrics
from pretrain.tracking.tracker import Tracker


class Told(NamedTuple):
    """What this rank has told the others of a step."""

    step: int  # from 0
    row: Gathering
    metrics: tuple[str, ...]  # of which the mean over the ranks counts
    phase: int  # of saving, in which it was told


class Trainer:
    """One run on one rank: the loop, and what it holds."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        sampler: Sampler,
        normalisation: Normalisation,
        device: torch.device,
        rank: int,
        world_size: int,
        startup: StartUp | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.startup = startup or StartUp(age=0.0)
        self.rank, self.world_size = rank, world_size
        self.normalisation = normalisation
        self.checkpoints = CheckpointFolder(folder, config.checkpoint)
        saved = last_of_all(self.checkpoints, device)
        if saved is not None:
            adopt = config.data.adopt == "next_epoch"
            sampler, change = continued(saved.order, sampler, saved.step, folder, adopt)
            self.say(change or "")
        if rank == 0:
            pin(folder, sampler.datasets)
        self.loader = loader_of(
            config,
            sampler,
            rank=rank,
            world_size=world_size,
            grad_accum_steps=config.train.grad_accum_steps,
            pin_memory=device.type == "cuda",
            bad_samples=BadSampleLog(folder / "bad_samples" / f"rank-{rank:05d}.jsonl"),
        )
        check_ranks_agree(self.loader, normalisation, world_size, device, config.method)
        self.timeline = Timeline.of(config.train, sampler.steps_per_epoch)
        check_warmup(config.optim, self.timeline)
        self.lr = learning_rate(config.optim, config.train.batch_size, self.timeline)
        self.weight_decay = weight_decay(config.optim, self.timeline)
        torch.manual_seed(config.seed)
        self.method: Method = build_method(config, normalisation, self.timeline)
        if config.init_from is not None and saved is None:
            self.say("\n".join(start_from(self.method, config.init_from, config.method.name)))
        self.startup.mark("model")
        self.engine = build_engine(config, self.method, device, world_size)
        self.startup.mark("engine")
        self.optimizer = optimizer_of(self.engine)
        self.told: Told | None = None  # what is not heard yet
        self.summary: dict[str, float] = {}  # the step last heard of, in numbers that hold for all ranks
        self.stopping = False
        self.saver = Saver(self.checkpoints, device)
        self.step = self.first = 0 if saved is None else self._resume(saved)
        self.saver.check_room(self.engine)
        self.startup.mark("resume")
        self.tracker = Tracker(folder, config, self.step) if rank == 0 else None
        self.machines = SystemMetrics(folder, config, device)
        self.startup.mark("tracking")
        self.window = Window(self.step)
        self.watched: Watched | None = None
        self.drawing = Drawing(config, normalisation, device)
        self.diagnostics = Diagnostics(
            config, folder, self.engine, self.method, self.loader, self.timeline, self.lr, device, rank
        )
        self.control = StepControl(
            config, folder, self.method, self.loader, self.diagnostics, device, rank, self.saver.settle
        )

    def train(self, stop: StopRequest, watchdog: Watchdog) -> None:
        """Run to the end of the timeline, or to the end of the step in which a stop is requested."""
        self._announce()
        self.say(self.diagnostics.begin(self.step))
        self.engine.train()
        if self.rank == 0:
            self.watched = Watched(self.step, self.timeline.total_steps, self.config.train.batch_size, self.window)
        steps = DeviceSteps(self.loader, self.step, self.device)
        while self.step < self.timeline.total_steps:
            watchdog.step(self.step + 1)
            micro_batches, digest = next(steps)
            watchdog.phase("step")
            self.method.before_step(self.step, micro_batches, self.look)
            self.control.before_step()
            metrics = self.optimizer_step(micro_batches)
            took = self.control.took(self.optimizer.norm)
            self.method.after_step(self.step, took)
            self.control.after_step(took)
            self.tell(metrics, digest, stop)
            self.step += 1
            if self.step == self.first + 1:
                stage = self.config.engine.zero_stage
                self.startup.done(self.folder, self.rank, self.world_size, step=self.first, zero_stage=stage)
            if self._is_due():
                self.hear()
            with self.window.paused(), watchdog.allowing("diagnostics"):
                looked = self.diagnostics.look(self.step, micro_batches)
            with watchdog.allowing("report"):
                self.report(looked, micro_batches)
            finished = self.stopping or self.step == self.timeline.total_steps
            if finished or self._is_checkpoint() or self._is_milestone():
                with watchdog.allowing("checkpoint"):
                    self.save(wait=finished)
            if self.stopping and self.step < self.timeline.total_steps:
                self.say(f"stopped after step {self.step} as asked; the same command continues from {self.saver.last}")
                return
        with watchdog.allowing("publish"):
            self.publish()

    def look(self, batch: Batch) -> None:
        """A forward pass that nothing is learned from."""
        with torch.no_grad(), drawn(self.config.seed, self.step, batch["rows"]):
            self.engine(batch, self.step)

    def optimizer_step(self, micro_batches: list[Batch]) -> dict[str, Tensor | float]:
        """Forward and backward over the micro-batches, then a step; the mean of what is reported."""
        rate, decay = set_rates(self.optimizer.rules, self.step, self.lr, self.weight_decay)
        totals: dict[str, Tensor | float] = {}
        for position, batch in enumerate(micro_batches):
            seed_dropout(self.config.seed, self.step, self.rank, position)
            with drawn(self.config.seed, self.step, batch["rows"]):
                output = self.engine(batch, self.step)
            self.engine.backward(output["loss"])
            for name, value in output.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float() / len(micro_batches)
            if position == len(micro_batches) - 1:
                self.hear()  # of the step before, while the device has all of this one before it
            self.engine.step()
        return totals | {"lr": rate, "weight_decay": decay}

    def tell(self, metrics: dict[str, Tensor | float], digest: int, stop: StopRequest) -> None:
        """Begin to tell the other ranks of the step that has just been enqueued; `hear` reads what all have told.

        Each tells its metrics, whether it was asked to stop, the bad samples it met since the start, a digest of the
        ids that it really saw (a proof of the order of data), how far its saving is, and what diagnostics ask for.
        """
        own = {"stop": float(stop.requested), "bad_samples": float(self.loader.num_bad), "ids_digest": float(digest)}
        own |= {"saving": self.saver.status} | self.diagnostics.signals()
        assert self.optimizer.norm is not None
        row = begin_all_gather_scalars({**metrics, "grad_norm": self.optimizer.norm, **own}, self.device)
        self.told = Told(self.step, row, tuple(metrics), self.saver.phase)

    def hear(self) -> None:
        """Take in what all ranks told of the last step, if that has not been done.

        No step waits for the device to tell how it went: it is heard of when the next one is about to change the
        weights, or at once where something is written down after it (see `_is_due`). So bears one step's delay

        - a stop request: the run ends a step later, and saves that;
        - the end of a save: the checkpoint gets its name a step later;
        - an alarm of `diagnostics.stop_on`: the run ends a step later, without a checkpoint as before;
        - a step that is not finite: the optimizer has left it out by itself where its gradients were; it is named, or
          the run ended, before the next step changes the weights, and before anything is saved.
        """
        if self.told is None:
            return
        told, self.told = self.told, None
        agreed = told.row.read()
        self.stopping = self.stopping or agreed.any("stop")
        self.saver.hear(agreed.by_rank["saving"], told.phase)
        grad_norm = agreed.by_rank["grad_norm"][0]
        if self.control.counts(told.step, agreed):
            self.diagnostics.record(told.step, agreed, grad_norm)
        self.summary = {name: agreed.mean(name) for name in told.metrics}
        self.summary["ids_digest"] = int(agreed.total("ids_digest")) % 2**32
        self.summary["bad_samples"] = int(agreed.total("bad_samples"))
        self.summary["grad_norm"] = grad_norm

    def _is_due(self) -> bool:
        """Whether the step just taken must be heard of now: something is written down after it, or it is the last."""
        return (
            self.stopping
            or self._is_logged()
            or self.diagnostics.is_due(self.step)
            or self._is_checkpoint()
            or self._is_milestone()
        )

    def _is_logged(self) -> bool:
        tracking = self.config.tracking
        every = (tracking.log_every_steps, tracking.pictures_every_steps)
        ends = self.step in (1, self.first + 1, self.timeline.total_steps)
        return ends or any(period and self.step % period == 0 for period in every)

    def report(self, looked: dict[str, float], micro_batches: list[Batch]) -> None:
        """Write metrics and pictures down when it is time to, and what diagnostics have `looked` at."""
        tracking = self.config.tracking
        last, epoch = self.step == self.timeline.total_steps, self.timeline.epoch(self.step)
        due = self.step % tracking.log_every_steps == 0 or self.step == 1 or last or bool(looked)  # on all ranks alike
        metrics = looked | self.summary
        if due:
            metrics |= {"epoch": epoch, **self.window.measure(self.step, self.config.train.batch_size, self.loader)}
            metrics["memory_gb"] = memory_gb(self.device)
            metrics |= self.method.schedules(self.step - 1)
            machines = self.machines.gather()  # by all ranks
            if self.tracker:
                changes = self.diagnostics.watch(self.step, epoch, metrics)
                self.tracker.metrics(self.step, metrics)
                self.tracker.system(self.step, machines)
                seconds = self.window.seconds_per_step
                self.tracker.say(progress_line(self.step, self.timeline.total_steps, epoch, metrics, seconds))
                if "knn_top1" in metrics:
                    self.tracker.say(knn_line(metrics))
                for change in changes:
                    self.tracker.alarm(change.name, change.text, change.begins)
        if self.watched:
            self.watched.step(self.step, epoch, metrics, self.loader.wait_seconds, told=due)
        every = tracking.pictures_every_steps
        if every and (self.step % every == 0 or self.step == 1 or last):
            with self.window.paused():
                self._draw(micro_batches[0])

    def _draw(self, batch: Batch) -> None:
        pictures = self.drawing.pictures(self.engine, self.method, self.loader.sampler, batch)
        if self.tracker:
            for name, picture in pictures.items():
                self.tracker.picture(self.step, name, picture)

    def save(self, wait: bool) -> None:
        """Write a checkpoint of the present step, while training goes on unless it is to `wait`."""
        state = ResumeState(
            step=self.step,
            world_size=self.world_size,
            zero_stage=self.config.engine.zero_stage,
            order=self._pinned(),
            milestone=self._is_milestone(),
            form=FORM,
            counters=live_state.counters(self.engine),
        )
        with self.window.paused():
            self.saver.save(self.engine, state, self.export(), wait)

    def export(self) -> Export:
        """What is saved for use beyond the run, as of the present step."""
        return export_of(self.method, self.config, self.normalisation, self.step, self.timeline.epoch(self.step))

    def publish(self) -> None:
        """Put the last checkpoint's encoder at `RUN/encoder`, or its tokenizer at `RUN/tokenizer`."""
        what = spec_of(self.config.method).exports
        last = self.saver.last
        if last != self.checkpoints.path(self.step):
            raise NotSavedError(f"the last checkpoint could not be written; the same command continues from {last}")
        if self.rank == 0:
            patiently(self.folder / what, "writing", lambda: self.checkpoints.publish(last, self.folder / what))
        dist.barrier()
        self.say(f"finished {self.step} steps; the {what} is in {self.folder / what}")

    def close(self) -> None:
        """Release threads, files and the dashboard."""
        if self.watched:
            self.watched.close()
        self.loader.close()
        self.machines.close()
        if self.tracker:
            self.tracker.close()

    def _resume(self, saved: ResumeState) -> int:
        path = self.checkpoints.path(saved.step)
        check_resume(path, saved, self._pinned())
        self.saver.restore(self.engine, path, saved)
        self.say(f"continuing from {path}")
        return saved.step

    def _pinned(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        masks = {"masks": masking.DRAWS} if self.loader.draw is not None else {}
        return {**self.loader.sampler.state(), "backend": self.loader.backend, **masks, **self.method.pinned()}

    def _is_milestone(self) -> bool:
        return self.timeline.is_due(self.step, self.config.checkpoint.milestone_every_epochs)

    def _is_checkpoint(self) -> bool:
        config = self.config.checkpoint
        return self.step % config.every_steps == 0 or self.timeline.is_due(self.step, config.every_epochs)

    def _announce(self) -> None:
        config, module = self.config, self.export().module
        size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters())
        on = "" if config.encoder is None else f" on {config.encoder.family}"
        self.say(
            f"{config.name}: {config.method.name}{on} ({size / 1e6:.1f} M parameters), "
            f"{counted(self.world_size, 'rank')} on {self.device.type}, ZeRO {config.engine.zero_stage}, "
            f"{config.engine.precision}, crops by {self.loader.backend}; "
            f"global batch {config.train.batch_size} = {counted(self.world_size, 'rank')} x "
            f"{config.train.batch_size // self.world_size // config.train.grad_accum_steps} x "
            f"{config.train.grad_accum_steps} accumulated; {self.timeline.total_steps} steps "
            f"({self.timeline.epoch(self.timeline.total_steps):.2f} epochs); writing to {self.folder}"
        )

    def say(self, text: str) -> None:
        """Print once, whatever the number of ranks."""
        if self.rank == 0 and text:
            print(text, flush=True)
