"""What the training loop holds of diagnostics: one object a rank, asked once a step and once a log line."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.loader import Batch, Loader
from pretrain.config import ALARMS, Config
from pretrain.diagnostics.alarms import Alarms, Change, Moment
from pretrain.diagnostics.clock import ForwardClock, SlowestRank
from pretrain.diagnostics.collapse import collapse_rules
from pretrain.diagnostics.features import (
    MOST_ROWS,
    evaluating,
    feature_statistics,
    frozen_features,
    rows_of_all_ranks,
    whole_encoder,
)
from pretrain.diagnostics.knn import OnlineKnn
from pretrain.diagnostics.learning import Slow, learning_rules
from pretrain.diagnostics.spikes import gradient_spikes, loss_spikes
from pretrain.diagnostics.start import FromStart
from pretrain.diagnostics.weights import weight_statistics
from pretrain.diagnostics.worse_than_start import WorseThanStart
from pretrain.encoders import Encoder
from pretrain.encoders.native import PackedImages
from pretrain.encoders.saved import headline_feature
from pretrain.engines.collectives import GatheredScalars, all_gather_objects
from pretrain.engines.schedules import Cosine, Steps, Timeline
from pretrain.methods.base import Method
from pretrain.methods.frozen import Frozen
from pretrain.stream.native_batch import first_of
from pretrain.survival.history import read_history, standing_alarms, try_record
from pretrain.tracking.course import Course, measured_rows


class Diagnostics:
    """The alarms of a run on one rank, and its k-NN; what is done about them is `pretrain.step_control`'s.

    Nothing here changes what is learned: forward passes are in evaluation mode, and whatever they count is put back.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        engine: Any,
        method: Method,
        loader: Loader,
        timeline: Timeline,
        rate: Cosine | Steps,
        device: torch.device,
        rank: int,
        start: Frozen | None = None,
    ) -> None:
        self.config, self.settings, self.folder = config, config.diagnostics, folder
        self.engine, self.method, self.loader = engine, method, loader
        self.timeline, self.device, self.rank = timeline, device, rank
        self.spikes = (loss_spikes(), gradient_spikes(config.optim.clip_grad))
        rules = [
            *self.spikes,
            *collapse_rules(config, timeline, method),
            *learning_rules(config, timeline, rate.peak, rate.warmup_steps),
        ]
        self.course = Course()
        self.from_start: FromStart | None = None
        if start is not None and config.continuing is not None and config.continuing.measure_every_epochs is not None:
            datasets = list(loader.sampler.datasets.values())
            self.from_start = FromStart(config, start, method.normalise, datasets, device)
            rules.append(WorseThanStart(self.course))
        self.slow = next(rule for rule in rules if isinstance(rule, Slow))
        self.alarms = Alarms(rules, self.settings.stop_on, self.settings.patience)
        self.knn = OnlineKnn(config, method.normalise, device, rank)
        self.is_best = False  # whether the last measurement of the course was
        self.clock = ForwardClock(method, device)
        self.began = time.monotonic()

    def begin(self, step: int) -> str:
        """What the ranks must know of each other; what to say of k-NN. Collective, once, at optimizer step `step`."""
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        events = read_history(self.folder) if self.rank == 0 else []
        self.alarms.restore(standing_alarms([*events, {"event": "started", "step": step}]))
        skipped = [event["step"] for event in events if event.get("skipped") and event["step"] <= step]
        told = all_gather_objects({"host": host, "skipped": skipped, "knn": self.knn.found}, self.device)
        self.skipped = set(told[0]["skipped"])  # steps left out before
        self.slowest = SlowestRank([each["host"] for each in told])
        line = self.knn.agree(told[0]["knn"])
        self.began = time.monotonic()
        return line

    def signals(self) -> dict[str, float]:
        """What this rank tells the others each step: rank 0, that an alarm ends the run; all, how long they compute."""
        fatal = self.alarms.fatal() if self.rank == 0 else None
        return {"trouble": 0.0 if fatal is None else 1.0 + ALARMS.index(fatal), "forward_seconds": self.clock.read()}

    def record(self, step: int, agreed: GatheredScalars, grad_norm: float) -> None:
        """Take in optimizer step `step` (from 0), which was taken."""
        self.slowest.add(agreed.by_rank["forward_seconds"])
        for spikes, value in zip(self.spikes, (agreed.mean("loss"), grad_norm), strict=True):
            spikes.add(step + 1, value)

    def is_due(self, step: int) -> bool:
        """Whether it is time to look, after `step` steps; on all ranks alike."""
        return self._inspects(step) or self._measures(step) or self._compares(step) or self.method.is_measured(step)

    def _inspects(self, step: int) -> bool:
        every = self.settings.inspect_every_steps
        return bool(every) and (step % every == 0 or step in (1, self.timeline.total_steps))

    def _measures(self, step: int) -> bool:
        due = self.timeline.is_due(step, self.settings.knn_every_epochs)
        return self.knn.is_on and (due or self._compares(step))

    def _compares(self, step: int) -> bool:
        continuing = self.config.continuing
        if self.from_start is None or continuing is None:
            return False
        return self.timeline.is_due(step, continuing.measure_every_epochs) or step == self.timeline.total_steps

    def look(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        """After `step` steps: what the weights, the frozen encoder and the method itself say, when it is time to look.
        Collective."""
        self.is_best = False
        inspects, measures, by_method = self._inspects(step), self._measures(step), self.method.is_measured(step)
        compares = self._compares(step)
        if not (inspects or measures or compares or by_method):
            return {}
        encoder = self.method.frozen_encoder()
        found: dict[str, float] = {}
        encoder = None if encoder is None else whole_encoder(encoder, self.config, self.device)
        with evaluating(self.engine, self.config.engine.precision, self.device):
            if inspects:
                found |= weight_statistics(self.method, self.device)
                if encoder is not None:
                    found |= feature_statistics(self._features(encoder, micro_batches))
            if measures and encoder is not None:
                found |= self.knn.measure(encoder)
                found["knn_share"] = self.knn.seconds / max(time.monotonic() - self.began, 1e-9)
            if compares and encoder is not None:
                found |= self._of_start(encoder)
            if by_method:
                found |= self.method.measure(step, self.device)
        if compares:
            self.is_best = self.course.take(step, found)
        return found

    def begin_course(self, step: int, rows: Path) -> dict[str, float]:
        """Measure the start, where a run begins that is compared with it, or read from `rows` how it went so far, up to
        `step`. What was measured. Collective, after `begin`."""
        if self.from_start is None:
            return {}
        known = measured_rows(rows, step) if self.rank == 0 else []
        for past, metrics in all_gather_objects(known, self.device)[0]:
            self.course.take(past, metrics)
        if self.course.start is not None or step:
            return {}
        encoder = self.method.frozen_encoder()
        assert encoder is not None
        encoder = whole_encoder(encoder, self.config, self.device)
        with evaluating(self.engine, self.config.engine.precision, self.device):
            found = self.knn.measure(encoder) if self.knn.is_on else {}
            found |= self._of_start(encoder)
        self.course.take(0, found)
        return found

    def _of_start(self, encoder: Encoder) -> dict[str, float]:
        """What the first rank finds, on all ranks: one of them looks, so that all judge alike. Collective."""
        found: dict[str, float] = {}
        if self.rank == 0 and self.from_start is not None:
            try:
                found = self.from_start.measure(encoder)
            except OSError as error:  # a file system that fails is no reason not to train, nor to let others wait
                print(f"the run could not be compared with its start: {error}", flush=True)
        return all_gather_objects(found, self.device)[0]

    def watch(self, step: int, epoch: float, metrics: dict[str, float]) -> list[Change]:
        """Take a log line in, on rank 0: alarms that begin or are over. What stands is added to `metrics`."""
        if self.slow.can_tell(Moment(step, epoch, metrics)):
            self.slow.suspect = self.slowest.named()
        changes = self.alarms.look(Moment(step, epoch, metrics))
        metrics |= self.alarms.metrics() | {spikes.name: float(spikes.count) for spikes in self.spikes}
        for change in changes:
            try_record(self.folder, "alarm", step=step, name=change.name, text=change.text, begins=change.begins)
        return changes

    def _features(self, encoder: Encoder, micro_batches: list[Batch]) -> Tensor:
        """The frozen encoder's features (n, d) of the first global crops of all ranks, not more than `MOST_ROWS`."""
        most = max(1, MOST_ROWS // len(self.slowest.hosts) // len(micro_batches))
        name = headline_feature(self.config)
        rows = [frozen_features(encoder, self._first(batch, most), name) for batch in micro_batches]
        return rows_of_all_ranks(torch.cat(rows))

    def _first(self, batch: Batch, most: int) -> Tensor | PackedImages:
        """The first global crops of the first rows."""
        if "global_patches" in batch:
            return first_of(self.method.packed(batch), min(most, len(batch["rows"])))
        return self.method.normalise(batch["global_crops"][:most, 0])
