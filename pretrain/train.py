"""The training loop: the same on one CPU process and on many GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.datasets.bad_samples import BadSampleLog
from data_pipelines.loader import Batch
from data_pipelines.retry import patiently
from data_pipelines.sampler import Sampler
from data_pipelines.wording import counted
from pretrain.agreement import Agreement
from pretrain.checkpoints.exports import Export, export_of
from pretrain.checkpoints.folder import FORM, CheckpointFolder, ResumeState, check_resume
from pretrain.checkpoints.saving import NotSavedError, Saver, last_of_all
from pretrain.config import Config
from pretrain.continuing.optimizer import take_optimizer
from pretrain.continuing.start import prepare
from pretrain.diagnostics import Diagnostics, knn_line
from pretrain.encoders.drop_path import drawn
from pretrain.engines import live_state
from pretrain.engines.engine import build_engine, optimizer_of
from pretrain.engines.optim import set_rates
from pretrain.engines.schedules import Timeline, check_warmup, learning_rate, weight_decay
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
from pretrain.tracking.peaks import peak_flops
from pretrain.tracking.progress import Watched, Window, memory_gb, progress_line
from pretrain.tracking.step_clock import StepClock
from pretrain.tracking.step_profile import StepProfile
from pretrain.tracking.system_metrics import SystemMetrics
from pretrain.tracking.tracker import METRICS, Tracker
from pretrain.tracking.work import rates_of


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
        start, lines = prepare(self.method, config, normalisation, folder, rank, begins=saved is None)
        self.say("\n".join(lines))
        self.startup.mark("model")
        self.engine = build_engine(config, self.method, device, world_size)
        self.startup.mark("engine")
        self.say(take_optimizer(self.engine, config) if saved is None else None)
        self.optimizer = optimizer_of(self.engine)
        self.saver = Saver(self.checkpoints, device)
        self.step = self.first = 0 if saved is None else self._resume(saved)
        self.saver.check_room(self.engine)
        self.startup.mark("resume")
        self.tracker = Tracker(folder, config, self.step) if rank == 0 else None
        self.machines = SystemMetrics(folder, config, device)
        self.startup.mark("tracking")
        self.window = Window(self.step)
        self.clock = StepClock(device)
        self.profile = StepProfile(folder, device, self.clock, config.tracking.profile_steps, rank)
        self.watched: Watched | None = None
        self.drawing = Drawing(config, normalisation, device)
        self.diagnostics = Diagnostics(
            config, folder, self.engine, self.method, self.loader, self.timeline, self.lr, device, rank, start
        )
        self.control = StepControl(
            config, folder, self.method, self.loader, self.diagnostics, device, rank, self.saver.settle
        )
        self.agreement = Agreement(self.loader, self.saver, self.control, self.diagnostics, self.clock, device)

    def train(self, stop: StopRequest, watchdog: Watchdog) -> None:
        """Run to the end of the timeline, or to the end of the step in which a stop is requested."""
        self._announce()
        self.say(self.diagnostics.begin(self.step))
        with watchdog.allowing("diagnostics"):
            self.begin_course()
        self.engine.train()
        if self.rank == 0:
            self.watched = Watched(self.step, self.timeline.total_steps, self.config.train.batch_size, self.window)
        peak = peak_flops(self.device, self.config.engine.precision, self.config.tracking.peak_tflops)
        steps = DeviceSteps(self.loader, self.step, self.device)
        while self.step < self.timeline.total_steps:
            watchdog.step(self.step + 1)
            self.profile.begin()
            with self.clock.part("data"):
                micro_batches, digest = next(steps)
            watchdog.phase("step")
            self.method.before_step(self.step, micro_batches, self.look)
            self.control.before_step(self.step)
            metrics = self.optimizer_step(micro_batches)
            took = self.control.took(metrics["grad_norm"])
            with self.clock.part("average"):
                self.method.after_step(self.step, took)
            self.control.after_step(self.step, took)
            self.agreement.tell(self.step, metrics, digest, stop.requested)
            self.step += 1
            if self.step == self.first + 1:
                stage = self.config.engine.zero_stage
                self.startup.done(self.folder, self.rank, self.world_size, step=self.first, zero_stage=stage)
                with self.window.paused(), watchdog.allowing("counting FLOPs"):
                    self.window.rates = rates_of(self.method, micro_batches[0], self.look, peak, self.world_size)
            if self._is_due():
                self.agreement.hear()
            finished = self.agreement.stopping or self.step == self.timeline.total_steps
            with self.window.paused():
                self.say(self.profile.end(self.step, last=finished))
            with self.window.paused(), watchdog.allowing("diagnostics"):
                looked = self.diagnostics.look(self.step, micro_batches)
            with watchdog.allowing("report"):
                self.report(looked, micro_batches)
            if finished or self._is_checkpoint() or self._is_milestone() or self.diagnostics.is_best:
                with watchdog.allowing("checkpoint"):
                    self.save(wait=finished)
            if self.agreement.stopping and self.step < self.timeline.total_steps:
                self.say(f"stopped after step {self.step} as asked; the same command continues from {self.saver.last}")
                return
        with watchdog.allowing("publish"):
            self.publish()

    def begin_course(self) -> None:
        """Measure what a run goes on from before its first step, for all that comes to be compared with."""
        found = self.diagnostics.begin_course(self.step, self.folder / METRICS)
        if found and self.tracker:
            self.tracker.metrics(0, {"epoch": 0.0, **found})
            self.say(f"the start: {knn_line({'knn_share': 0.0, **found})}" if "knn_top1" in found else None)

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
            with self.clock.part("forward"), drawn(self.config.seed, self.step, batch["rows"]):
                output = self.engine(batch, self.step)
            with self.clock.part("backward"):
                self.engine.backward(output["loss"])
            for name, value in output.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float() / len(micro_batches)
            if position == len(micro_batches) - 1:
                self.agreement.hear()  # of the step before, while the device has all of this one before it
            with self.clock.part("optimizer"):
                self.engine.step()
        assert self.optimizer.norm is not None
        return totals | {"grad_norm": self.optimizer.norm, "lr": rate, "weight_decay": decay}

    def _is_due(self) -> bool:
        """Whether the step just taken must be heard of now: something is written down after it, or it is the last."""
        return (
            self.agreement.stopping
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
        metrics = looked | self.agreement.summary
        if due:
            metrics |= {"epoch": epoch, **self.window.measure(self.step, self.config.train.batch_size, self.loader)}
            metrics |= self.clock.read(self.window.seconds)
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
                if "drift_cka" in metrics and (words := self.diagnostics.course.words()) is not None:
                    self.tracker.say(words)
                if (line := self.method.measured_line(metrics)) is not None:
                    self.tracker.say(line)
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
            best=self.diagnostics.is_best,
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
        self.say(self.profile.close(self.step))
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
        size = sum(math.prod(live_state.whole_shape(p)) for p in module.parameters())
        on = "" if config.encoder is None else f" on {config.encoder.family}"
        self.say(
            f"{config.name}: {config.method.name}{on} ({size / 1e6:.1f} M parameters), "
            f"{counted(self.world_size, 'rank')} on {self.device.type} x {counted(torch.get_num_threads(), 'thread')}, "
            f"ZeRO {config.engine.zero_stage}, {config.engine.precision}, "
            f"crops by {self.loader.backend} in {self.loader.makers}{' a rank' * (self.world_size > 1)}; "
            f"global batch {config.train.batch_size} = {counted(self.world_size, 'rank')} x "
            f"{config.train.batch_size // self.world_size // config.train.grad_accum_steps} x "
            f"{config.train.grad_accum_steps} accumulated; {self.timeline.total_steps} steps "
            f"({self.timeline.epoch(self.timeline.total_steps):.2f} epochs); writing to {self.folder}"
        )

    def say(self, text: str | None) -> None:
        """Print once, whatever the number of ranks."""
        if self.rank == 0 and text:
            print(text, flush=True)
