"""Held-out images measured while a classifier is trained: the weights themselves, and their slow average.

All ranks share the images, and always the same ones go through the network together, so that no number depends on how
many ranks there are. The best weights are kept; which they are is chosen on these images, so the last step's are what
is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.eval_loader import center_crops
from data_pipelines.eval_maps import CenterMaps
from data_pipelines.files import read_json, staged, write_json
from eval.statistics import blind_average_precision
from pretrain.config import Config
from pretrain.encoders import Encoder
from pretrain.engines.collectives import all_gather_objects
from pretrain.engines.schedules import Timeline
from pretrain.methods.finetune.labels import HeldOut, Labels
from pretrain.methods.finetune.masks import places_of
from pretrain.methods.finetune.network import Head, classify
from pretrain.methods.finetune.scores import (
    binomial_error,
    blind_overlap,
    bootstrap_error,
    mean_average_precision,
    mean_overlap,
    overlaps,
    r_squared,
)

CHUNK = 64  # images of a forward pass
MOST_CONFUSED = 200  # classes of which the confusion matrix is written down
#: The score that stands for each task; the higher, the better.
HEADLINE = {"one_label": "top1", "several_labels": "map", "numbers": "r2", "segmentation": "miou"}


class Measured(NamedTuple):
    """What came out for one network: scores to log, and more to write down; `blind`: the headline of who says the most
    frequent class of pixels everywhere."""

    scores: dict[str, float]
    more: dict[str, Any]
    blind: float = 0.0


class Validation:
    """Measures, keeps the best, and writes the last measurement into `eval/` of the run.

    save: writes the classifier, as of a step and an epoch, into a new folder.
    """

    def __init__(
        self, config: Config, labels: Labels, timeline: Timeline, save: Callable[[Path, int, float], None]
    ) -> None:
        self.save = save
        self.config, self.space, self.timeline = config, labels.space, timeline
        self.val: HeldOut | None = labels.val
        self.train_counts = _counts(labels)
        self.folder = Path(config.runs) / config.name
        self.seconds = 0.0

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps; on all ranks alike."""
        every = self.config.method.val_every_epochs
        return step == self.timeline.total_steps or self.timeline.is_due(step, every)

    def measure(
        self,
        nets: Mapping[str, tuple[Encoder, Head]],
        normalise: Callable[[Tensor], Tensor],
        step: int,
        device: torch.device,
    ) -> dict[str, float]:
        """The scores of each network, called `NAME_SCORE`; {} where a rank has no held-out images. Collective."""
        if not all(all_gather_objects(self.val is not None, device)):
            return {}
        began = time.monotonic()
        found = {name: self._measure(encoder, head, normalise, device) for name, (encoder, head) in nets.items()}
        seconds = time.monotonic() - began
        scores = {f"{name}_{key}": value for name, each in found.items() for key, value in each.scores.items()}
        if _rank() == 0:
            self._keep_if_best(self.headline(scores), step)
            if step == self.timeline.total_steps:
                self._write(found, step, seconds)
        return scores | {"val_seconds": seconds}

    def line(self, metrics: Mapping[str, float]) -> str | None:
        """What was measured last, in a line: `held out: top-1 43.2%, averaged 45.0%, in 1.2 s`."""
        score = HEADLINE[self.space.task]
        if f"val_{score}" not in metrics:
            return None
        words = {"top1": "top-1", "map": "mAP", "r2": "R2", "miou": "mIoU"}[score]
        form = ".3f" if score == "r2" else ".1%"  # as the probe of numbers says it
        averaged = f", averaged {metrics[f'ema_{score}']:{form}}" if f"ema_{score}" in metrics else ""
        return f"held out: {words} {metrics[f'val_{score}']:{form}}{averaged}, in {metrics['val_seconds']:.1f} s"

    def _keep_if_best(self, score: float, step: int) -> None:
        """Put the weights into `best/` of the run where they score higher than those that are there."""
        best = self.best()
        if not math.isfinite(score) or (best is not None and best["score"] >= score):
            return
        epoch = self.timeline.epoch(step)
        with staged(self.folder / "best", overwrite=True) as folder:
            self.save(folder, step, epoch)
            write_json(folder / "best.json", {"step": step, "epoch": epoch, "score": score})

    def headline(self, scores: Mapping[str, float]) -> float:
        """The one number that says how good the weights are that the run is for."""
        averaged = "ema" if self.config.method.ema is not None else "val"
        return scores[f"{averaged}_{HEADLINE[self.space.task]}"]

    def best(self) -> dict[str, Any] | None:
        """What is known of the best weights so far: `step` and `score`."""
        found = read_json(self.folder / "best" / "best.json")
        return found if isinstance(found, dict) else None

    @torch.no_grad()
    def _measure(
        self, encoder: Encoder, head: Head, normalise: Callable[[Tensor], Tensor], device: torch.device
    ) -> Measured:
        assert self.val is not None
        if self.space.task == "segmentation":
            return self._of_pixels(encoder, head, normalise, device)
        outputs, samples = [], []
        for images, numbers in self._crops():
            outputs.append(classify(encoder, head, normalise(images.to(device))).float())
            samples.append(numbers)
        count = len(self.space.classes)
        mine = torch.cat(outputs) if outputs else torch.zeros(0, count, device=device)
        numbers = torch.cat(samples).numpy() if samples else np.zeros(0, dtype=np.int64)
        truth = self.val.table.rows(numbers, count)
        if self.space.task == "one_label":
            return self._of_classes(mine, torch.from_numpy(truth).to(device))
        found = _of_all_ranks(mine.cpu().numpy(), numbers, self.val.dataset.num_samples, device)
        known = np.flatnonzero(found[:, -1])
        return self._of_several(found[known, :-1], self.val.table.rows(known, count))

    def _of_classes(self, outputs: Tensor, truth: Tensor) -> Measured:
        """Outputs (n, c) and classes (n,) of this rank's images."""
        count = outputs.shape[1]
        losses = F.cross_entropy(outputs, truth, reduction="none").double()
        guessed = outputs.argmax(dim=1)
        confusion = torch.zeros(count * count, dtype=torch.float64, device=outputs.device)
        confusion.index_add_(0, truth * count + guessed, torch.ones_like(losses))
        near = (outputs.topk(min(5, count), dim=1).indices == truth[:, None]).any(dim=1)
        sums = torch.cat([confusion, torch.stack([losses.sum(), near.sum().double()])])
        if _world_size() > 1:
            dist.all_reduce(sums)
        table, (loss, in_five) = sums[:-2].view(count, count).cpu().numpy(), sums[-2:].tolist()
        total, right, of_class = table.sum(), table.trace(), table.sum(axis=1)
        shown = of_class > 0
        recall = table.diagonal()[shown] / of_class[shown]
        scores = {"loss": loss / max(total, 1), "top1": right / max(total, 1)}
        scores |= {"top5": in_five / max(total, 1)} if count > 5 else {}
        more = {
            "images": int(total),
            "top1_standard_error": binomial_error(scores["top1"], int(total)),
            "balanced_accuracy": float(recall.mean()) if shown.any() else 0.0,
            "recall": {
                self.space.classes[place]: float(value)
                for place, value in zip(np.flatnonzero(shown), recall, strict=True)
            },
        }
        if count <= MOST_CONFUSED:
            more["confusion"] = table.astype(int).tolist()  # rows: what they are; columns: what they are taken for
        return Measured({key: float(value) for key, value in scores.items()}, more)

    def _of_several(self, outputs: np.ndarray, truth: np.ndarray) -> Measured:
        """Outputs and truth (n, k) of all images: labels, or standardised numbers."""
        if self.space.task == "several_labels":
            value, each = mean_average_precision(outputs, truth)
            loss = np.logaddexp(0, outputs) - outputs * truth
            error = bootstrap_error(lambda found, known: mean_average_precision(found, known)[0], outputs, truth)
            precision = {name: score for name, score in zip(self.space.classes, each, strict=True) if score == score}
            scores = {"loss": float(loss.sum(axis=1).mean()), "map": value}
            return Measured(
                scores, {"images": len(truth), "map_standard_error": _or_none(error), "average_precision": precision}
            )
        scale = np.array(self.space.std)
        off = np.abs(outputs - truth) * scale
        scores = {"loss": float(((outputs - truth) ** 2).mean()), "r2": r_squared(outputs, truth)}
        scores |= {"mae": float(off.mean())}
        more = {
            "images": len(truth),
            "r2_standard_error": _or_none(bootstrap_error(r_squared, outputs, truth)),
            "mae_standard_error": float(off.mean(axis=1).std() / max(len(off), 1) ** 0.5),
        }
        return Measured(scores, more)

    def _of_pixels(
        self, encoder: Encoder, head: Head, normalise: Callable[[Tensor], Tensor], device: torch.device
    ) -> Measured:
        """Of centre crops and their masks: each image's pixels of every class that are right, taken for it, and its."""
        assert self.val is not None
        dataset, count = self.val.dataset, len(self.space.classes)
        size, resize = self.config.views.global_size[0], self.config.method.val_resize
        masks = CenterMaps(
            dataset, np.arange(dataset.num_samples), size, resize=resize, threads=self.config.data.threads
        )
        places = torch.from_numpy(places_of(self.space.keys))
        counts, samples = [np.zeros((0, 3 * count))], [np.zeros(0, dtype=np.int64)]
        for images, numbers in self._crops():
            guessed = classify(encoder, head, normalise(images.to(device))).float().argmax(dim=1).cpu()
            truth = places[masks[numbers] + 1]
            counts.append(_counts_of_pixels(guessed, truth, count))
            samples.append(numbers.numpy())
        found = _of_all_ranks(np.concatenate(counts), np.concatenate(samples), dataset.num_samples, device)
        kept = found[found[:, -1] > 0, :-1].astype(np.float64)
        right, _, of_class = kept.reshape(len(kept), 3, count).sum(axis=0)
        scores = {"miou": mean_overlap(kept, kept), "pixel_accuracy": float(right.sum() / max(of_class.sum(), 1))}
        more = {"images": len(kept), "miou_standard_error": _or_none(bootstrap_error(mean_overlap, kept, kept))}
        shown = zip(self.space.classes, overlaps(kept), strict=True)
        each = {name: float(value) for name, value in shown if value == value}
        return Measured(scores, more | {"iou": each}, blind_overlap(of_class))

    def _crops(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images in chunks, with their numbers: chunk c is rank c mod R's."""
        assert self.val is not None
        data, size = self.config.data, self.config.views.global_size[0]
        order = np.arange(self.val.dataset.num_samples)
        chunks = [order[first : first + CHUNK] for first in range(0, len(order), CHUNK)][_rank() :: _world_size()]
        samples = [int(sample) for chunk in chunks for sample in chunk]
        for images, _, numbers in center_crops(
            self.val.dataset, size, resize=self.config.method.val_resize, batch_size=CHUNK, channels=data.channels,
            bits=data.bits, samples=samples, threads=data.threads,
        ):  # fmt: skip
            yield images, numbers

    def _write(self, found: Mapping[str, Measured], step: int, seconds: float) -> None:
        assert self.val is not None
        task, counts = self.space.task, self.train_counts
        few = {name: int(n) for name, n in zip(self.space.classes, counts, strict=True) if n < 10} if counts else {}
        best = self.best()
        (self.folder / "eval").mkdir(exist_ok=True)
        write_json(
            self.folder / "eval" / f"finetune-{step:08d}.json",
            {
                "kind": "finetune",
                "task": task,
                "run": self.config.name,
                "step": step,
                "epoch": self.timeline.epoch(step),
                "started_from": self.config.init_from,
                "label": self.config.method.label,
                "image_size": list(self.config.views.global_size),
                "held_out": {"name": self.val.name, "checksum": self.val.dataset.checksum},
                "classes": list(self.space.classes),
                "rare_classes": few,  # of fewer than ten images to learn from
                "chance": self._chance(found),
                "headline": HEADLINE[task],
                "networks": {name: _finite(each.scores) | each.more for name, each in found.items()},
                "best": best,  # chosen on these images, so its score flatters
                "seconds": seconds,
            },
        )

    def _chance(self, found: Mapping[str, Measured]) -> float:
        """What the headline is without looking at images: the most frequent class, the mean, or a random order."""
        assert self.val is not None
        if self.space.task == "one_label":
            return float((self.val.table.values == int(np.argmax(self.train_counts or [0]))).mean())
        if self.space.task == "numbers":
            return 0.0
        if self.space.task == "segmentation":
            return next(iter(found.values())).blind
        truth = torch.from_numpy(self.val.table.rows(np.arange(self.val.dataset.num_samples), len(self.space.classes)))
        blind = blind_average_precision(len(truth), truth.sum(dim=0))
        return float(blind[blind > 0].mean()) if blind.any() else 0.0


def _counts(labels: Labels) -> list[int]:
    """Training images of each class; empty for numbers and masks."""
    if labels.space.task == "numbers":
        return []
    if labels.space.task == "segmentation":
        return []
    values = np.concatenate([table.values for table in labels.train])
    return np.bincount(values, minlength=len(labels.space.classes)).tolist()


def _counts_of_pixels(guessed: Tensor, truth: Tensor, count: int) -> np.ndarray:
    """(b, 3 c) of classes (b, h, w): each image's pixels that are right, that are taken for a class, that are of it."""
    judged = truth >= 0
    found = []
    for own, known, where in zip(guessed, truth, judged, strict=True):
        own, known = own[where], known[where]
        parts = (known[own == known], own, known)
        found.append(torch.cat([torch.bincount(part, minlength=count) for part in parts]))
    return torch.stack(found).numpy().astype(np.float64)


def _of_all_ranks(outputs: np.ndarray, numbers: np.ndarray, num_samples: int, device: torch.device) -> np.ndarray:
    """(n, k + 1) by sample: the outputs, and 1 where it could be read."""
    whole = torch.zeros(num_samples, outputs.shape[1] + 1, device=device)
    whole[torch.from_numpy(numbers).to(device), :-1] = torch.from_numpy(outputs).float().to(device)
    whole[torch.from_numpy(numbers).to(device), -1] = 1
    if _world_size() > 1:
        dist.all_reduce(whole)
    return whole.cpu().numpy()


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores as JSON has words for them."""
    return {name: _or_none(value) for name, value in scores.items()}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
