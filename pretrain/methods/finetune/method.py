"""Fine-tuning: an encoder and a linear head on labels, with mixup, cutmix, RandAugment, erasing, averaged weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from data_pipelines.rng import Purpose, stream_key
from pretrain.config import Config
from pretrain.continuing.low_rank import add_low_rank, without_changes
from pretrain.continuing.parts import train_last
from pretrain.encoders import Encoder, build_encoder
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Beside, Method, Normalisation
from pretrain.methods.finetune.draws import NOISE, draw_boxes, draw_mixes
from pretrain.methods.finetune.labels import Labels, read_labels
from pretrain.methods.finetune.masks import places_of
from pretrain.methods.finetune.mixing import mix
from pretrain.methods.finetune.network import Head, classify, head_for, reset_norm
from pretrain.methods.finetune.rand_augment import augment, draw_ops
from pretrain.methods.finetune.saved import HeadCard, save_classifier
from pretrain.methods.finetune.validation import Validation
from pretrain.stream.from_host import from_host, on_host


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Finetune:
    """The configuration's encoder with a head for the labels of its data."""
    assert config.encoder is not None
    return Finetune(config, read_labels(config), normalisation, timeline)


class Finetune(Method):
    """A linear head on an encoder, both trained on labels: classes, several of them, or numbers.

    What images are mixed with, and all else that is drawn, is a function of (seed, step, row of the global batch): a
    row's partner is its neighbour there, see `mixing.partners`.
    """

    def __init__(self, config: Config, labels: Labels, normalisation: Normalisation, timeline: Timeline) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.seed, self.labels = config.method, config.seed, labels
        self.repeats = config.data.repeated_augmentation
        size, channels = config.views.global_size, config.data.channels
        self.encoder = build_encoder(config.encoder, size, channels)
        self.head = self._fresh_head(self.encoder)
        self._add_changes(self.encoder, size, channels)
        self.average: nn.ModuleDict | None = None
        if self.config.ema is not None:
            encoder = build_encoder(dataclasses.replace(config.encoder, drop_path=0.0), size, channels)
            self._add_changes(encoder, size, channels)
            self.average = nn.ModuleDict({"encoder": encoder, "head": self._fresh_head(encoder)})
        train_last(self.encoder, self.config.train_blocks)
        self._copy_average()
        self.validation = Validation(config, labels, timeline, self._save)
        space = labels.space
        if space.task == "segmentation":
            self.register_buffer("level_places", torch.from_numpy(places_of(space.keys)), persistent=False)
        self.judged: Tensor | None = None  # pixels of a micro-batch, averaged over the global batch
        self.card = HeadCard(
            task=space.task, classes=space.classes, pool=self.head.pool, fc_norm=self.config.fc_norm,
            target_mean=space.mean, target_std=space.std, resize=self.config.val_resize,
        )  # fmt: skip

    def _fresh_head(self, encoder: Encoder) -> Head:
        return head_for(self.config, encoder.dim, len(self.labels.space.classes))

    def _add_changes(self, encoder: Encoder, size: tuple[int, int], channels: int) -> None:
        if self.config.lora is not None:
            add_low_rank(encoder, self.config.lora, size, channels)

    def encoder_loaded(self) -> None:
        if self.config.fc_norm:
            assert self.encoder is not None
            reset_norm(self.encoder)
        self._copy_average()

    def _copy_average(self) -> None:
        if self.average is not None:
            for name, slow in self.average.items():
                slow.load_state_dict(getattr(self, name).state_dict())
            self.average.requires_grad_(False)

    def train(self, mode: bool = True) -> Finetune:
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, targets = self.seen(batch, step)
        assert self.encoder is not None
        outputs = classify(self.encoder, self.head, images).float()
        task = self.config.task
        if task == "segmentation":
            return self._of_pixels(outputs, self._classes(batch["masks"]))
        if task == "numbers":
            return {"loss": F.mse_loss(outputs, targets)}
        if task == "several_labels":
            return {"loss": F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(dim=1).mean()}
        right = (outputs.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        return {"loss": -(targets * outputs.log_softmax(dim=1)).sum(dim=1).mean(), "train_top1": right.detach()}

    @torch.no_grad()
    def seen(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The images (b, c, h, w), normalised, and the targets (b, k) that are learned from, in training all changed
        and mixed."""
        crops, rows = batch["global_crops"][:, 0], on_host(batch["rows"])
        config, size = self.config, tuple(crops.shape[-2:])
        if config.task == "segmentation":
            return self.normalise(crops), crops.new_zeros(0)
        targets = self._targets(batch, crops.device)
        if config.rand_augment is not None:
            fill = (self.mean * 255).round()
            crops = augment(crops, draw_ops(config.rand_augment, self.seed, step, rows), fill)
        images = self.normalise(crops)
        if config.erasing:
            images = self._erased(images, draw_boxes(config, self.seed, step, rows, size), rows, step)
        if config.mixes:
            images, targets = mix(images, targets, draw_mixes(config, self.seed, step, rows, size), self.repeats)
        return images, targets

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        """How many pixels of the global batch are judged, so that each of them weighs the same in the loss."""
        if self.config.task == "segmentation":
            judged = torch.stack([(self._classes(batch["masks"]) >= 0).sum().float() for batch in micro_batches]).sum()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(judged)
                judged = judged / dist.get_world_size()
            self.judged = judged / len(micro_batches)

    def _classes(self, masks: Tensor) -> Tensor:
        """(b, h, w) int64 places among the classes of levels (b, h, w), -1 for what is not judged."""
        return self.level_places.index_select(0, (masks + 1).flatten()).view(masks.shape)

    def _of_pixels(self, outputs: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """The loss of logits (b, k, h, w), and the share of the micro-batch's pixels that are right."""
        own = (classes >= 0).sum()
        judged = own.float() if self.judged is None else self.judged
        total = F.cross_entropy(outputs, classes, ignore_index=-1, reduction="sum")
        right = ((outputs.argmax(dim=1) == classes).sum() / own.clamp_min(1)).float()
        return {"loss": total / judged.clamp_min(1.0), "train_top1": right.detach()}

    def _targets(self, batch: Batch, device: torch.device) -> Tensor:
        """(b, k) fp32: of classes what `label_smoothing` makes of 0 and 1, of numbers themselves, standardised."""
        ids, count = on_host(batch["ids"]), len(self.labels.space.classes)
        parts = [table.rows(ids[ids[:, 0] == number, 1], count) for number, table in enumerate(self.labels.train)]
        values = parts[0] if len(parts) == 1 else _in_order(parts, ids[:, 0])
        smoothing = self.config.label_smoothing
        targets = from_host(values, device)
        if self.config.task == "one_label":
            classes = torch.arange(count, device=device)
            hot = (rearrange(targets, "b -> b 1") == classes).float()
            return hot * (1 - smoothing) + smoothing / count
        return targets * (1 - smoothing) + smoothing / 2 if smoothing else targets

    def _erased(self, images: Tensor, boxes: np.ndarray, rows: np.ndarray, step: int) -> Tensor:
        """Normalised images, new, with noise in their boxes: of each row's own stream."""
        if not boxes.any():
            return images
        generator = torch.Generator(device=images.device)
        for place in np.flatnonzero(boxes.any(axis=1)).tolist():
            top, bottom, left, right = boxes[place].tolist()
            key = stream_key(self.seed, Purpose.FINETUNE, step, NOISE, int(rows[place]))
            images[place, :, top:bottom, left:right].normal_(generator=generator.manual_seed(key >> 1))
        return images

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [] if self.average is None else [(slow, getattr(self, name)) for name, slow in self.average.items()]

    def ema_momentum(self, step: int) -> float:
        """`ema`, below it as long as there are few steps to average over."""
        assert self.config.ema is not None
        return min(self.config.ema, (1 + step) / (10 + step))

    def frozen_encoder(self) -> Encoder | None:
        return self.encoder if self.average is None else self._encoder_of(self.average)

    def is_measured(self, step: int) -> bool:
        return self.validation.is_due(step)

    def measure(self, step: int, device: torch.device) -> dict[str, float]:
        assert self.encoder is not None
        nets: dict[str, tuple[Encoder, Head]] = {"val": (self.encoder, self.head)}
        if self.average is not None:
            head = self.average["head"]
            assert isinstance(head, Head)
            nets["ema"] = (self._encoder_of(self.average), head)
        return self.validation.measure(nets, self.normalise, step, device)

    def measured_line(self, metrics: dict[str, float]) -> str | None:
        return self.validation.line(metrics)

    def _save(self, folder: Path, step: int, epoch: float) -> None:
        """The classifier as it stands, into a new folder."""
        from pretrain.checkpoints.exports import export_of  # which knows methods

        normalisation = Normalisation(tuple(self.mean.tolist()), tuple(self.std.tolist()))
        export = export_of(self, self.validation.config, normalisation, step, epoch)
        export.write(folder, export.module.state_dict())

    def beside_encoder(self) -> Beside:
        parts = (
            self.average if self.average is not None else nn.ModuleDict({"encoder": self.encoder, "head": self.head})
        )
        return Beside(parts, self._write)

    def _write(self, folder: Path, weights: dict[str, Tensor], card: Any) -> None:
        named: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}}
        for key, value in weights.items():
            part, _, name = key.partition(".")
            named[part][name] = value
        assert self.encoder is not None
        save_classifier(folder, without_changes(self.encoder, named["encoder"]), named["head"], card, self.card)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        crops = batch["global_crops"][:, 0]
        images, _ = self.seen(batch, 0)
        return {"what is learned from": self.to_pictures(images, crops)}

    @staticmethod
    def _encoder_of(parts: nn.ModuleDict) -> Encoder:
        encoder = parts["encoder"]
        assert isinstance(encoder, Encoder)
        return encoder


def _in_order(parts: list[np.ndarray], numbers: np.ndarray) -> np.ndarray:
    """The rows of each data set's part, where they are in the batch."""
    whole = np.empty((len(numbers), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for number, part in enumerate(parts):
        whole[numbers == number] = part
    return whole
