"""Distillation: a student learns what a frozen teacher says of images and of their patches, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from data_pipelines.rng import Purpose, stream_keys, uniform_table
from pretrain.config import Config
from pretrain.encoders import Encoder, Features, Mask, build_encoder
from pretrain.encoders.load import LoadedEncoder, load_any
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.distill.config import DistillConfig
from pretrain.methods.distill.queue import FeatureQueue
from pretrain.methods.finetune.mixing import partners
from pretrain.methods.frozen import Frozen, checksum
from pretrain.methods.gram import gram_loss, on_grid
from pretrain.stream.from_host import from_host
from pretrain.stream.pixels import normalised


class Taught(NamedTuple):
    """What the teacher says: features of images (b, e) and of patches (b, n, e) fp32, on a map of `grid` (h, w)."""

    pooled: Tensor
    tokens: Tensor
    grid: tuple[int, int] | None


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Distill:
    """A student of the configuration's encoder, with the teacher that the method names."""
    method, views = config.method, config.views
    assert config.encoder is not None
    encoder = build_encoder(config.encoder, views.global_size, config.data.channels, mask_token=method.mask is not None)
    shown = views.global_size if views.teacher_crops is None else views.teacher_crops.size
    repeats = config.data.repeated_augmentation
    return Distill(method, encoder, load_any(method.teacher, shown), normalisation, timeline, config.seed, repeats)


class Distill(Method):
    """The student's features, brought to the teacher's width, are drawn to what the teacher says of the same crop.

    The teacher sees it in its own normalisation, or at its own size (`views.teacher_crops`). Patch features are
    compared on the teacher's map: the student's are resampled to it, bilinear. The losses are means over images: equal
    micro-batches on all ranks have the mean of them.
    """

    def __init__(
        self,
        config: DistillConfig,
        encoder: Encoder,
        teacher: LoadedEncoder,
        normalisation: Normalisation,
        timeline: Timeline,
        seed: int = 0,
        repeats: int = 1,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.seed, self.repeats = config, seed, repeats
        self.encoder = encoder
        width = teacher.encoder.dim
        if config.image_weight:
            self.image_head = head(encoder.dim, width, config.head_hidden_dim)
        if config.patch_weight and config.patch_loss != "similarity":
            self.patch_head = head(encoder.dim, width, config.head_hidden_dim)
        uses_queue = config.image_weight > 0 and config.image_loss == "queue"
        self.queue = FeatureQueue(config.queue_size, width) if uses_queue else None
        self._filling = False
        self.teacher = Frozen(teacher.encoder)
        self._checksum = checksum(teacher.encoder)
        self.register_buffer("teacher_mean", torch.tensor(teacher.mean), persistent=False)
        self.register_buffer("teacher_std", torch.tensor(teacher.std), persistent=False)

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.teacher.blocks()]

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        if step or self.queue is None:
            return
        self._filling = True  # the first images are compared with each other
        for batch in micro_batches:
            look(batch)
        self._filling = False
        self.queue.push()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        if self.queue is None:
            yield
            return
        with self.queue.forgetting():
            yield

    def after_step(self, step: int, took: Tensor | None = None) -> None:
        super().after_step(step, took)
        if self.queue is not None:
            self.queue.push()

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        taught = self.taught(batch, step)
        wanted = F.normalize(taught.pooled, dim=-1)
        if self.queue is not None and self.training:
            self.queue.note(wanted)
        if self._filling:
            return {"loss": taught.pooled.sum() * 0.0}
        mask = None if self.config.mask is None else Mask(token=batch["token_mask"])
        features = self.encoder(self._blended(self.normalise(batch["global_crops"][:, 0]), batch, step), mask)
        result: dict[str, Tensor] = {}
        if self.config.image_weight:
            told = self.image_head(features.pooled).float()
            result["image_loss"] = self._image_loss(told, taught.pooled)
            with torch.no_grad():
                result["image_cosine"] = F.cosine_similarity(told, taught.pooled, dim=-1).mean()
        if self.config.patch_weight:
            result["patch_loss"] = self._patch_loss(features, taught)
        loss = sum(
            weight * result[name]
            for name, weight in (("image_loss", self.config.image_weight), ("patch_loss", self.config.patch_weight))
            if weight
        )
        assert isinstance(loss, Tensor)
        with torch.no_grad():
            spread = {"feature_std": _spread(features.pooled)}
            if len(wanted) > 1:
                spread["teacher_std"] = _spread(taught.pooled)
        return {"loss": loss, **result, **spread}

    def taught(self, batch: Batch, step: int) -> Taught:
        """What the teacher says of a micro-batch."""
        crops = batch.get("teacher_crops", batch["global_crops"])[:, 0]
        features = self.teacher(self._blended(normalised(crops, self.teacher_mean, self.teacher_std), batch, step))
        return Taught(features.pooled.float(), features.tokens.float(), features.grid)

    def _image_loss(self, told: Tensor, wanted: Tensor) -> Tensor:
        """Of image features (b, e), the student's and the teacher's."""
        if self.config.image_loss == "mse":
            return F.mse_loss(told, wanted)
        if self.queue is None:
            return (1 - F.cosine_similarity(told, wanted, dim=-1)).mean()
        ours, theirs = F.normalize(told, dim=-1), F.normalize(wanted, dim=-1)
        return self.queue.divergence(ours, theirs, self.config.temperature)

    def _patch_loss(self, features: Features, taught: Taught) -> Tensor:
        if features.grid is None or taught.grid is None:
            who = "the encoder" if features.grid is None else "method.teacher"
            raise ValueError(f"{who} gives no map of patches to compare; set method.patch_weight=0")
        if self.config.patch_loss == "similarity":
            return gram_loss(on_grid(features.tokens, features.grid, taught.grid, "bilinear"), taught.tokens)
        told = on_grid(self.patch_head(features.tokens).float(), features.grid, taught.grid, "bilinear")
        if self.config.patch_loss == "mse":
            return F.mse_loss(told, taught.tokens)
        return (1 - F.cosine_similarity(told, taught.tokens, dim=-1)).mean()

    def _blended(self, images: Tensor, batch: Batch, step: int) -> Tensor:
        """Images (b, c, h, w), with `mixup` each blended with its partner's by a share that both have: uniform, a
        function of (seed, step, the pair's rows of the global batch)."""
        if not self.config.mixup:
            return images
        pairs = batch["rows"].numpy() // (2 * self.repeats)
        drawn = uniform_table(stream_keys(self.seed, Purpose.MIXUP, step, pairs.astype("uint64")), 1)[:, 0]
        share = rearrange(from_host(drawn.astype("float32"), images.device), "b -> b 1 1 1")
        return images * share + partners(images, self.repeats) * (1 - share)

    def pinned(self) -> dict[str, str]:
        """The teacher's weights: a run that is named as the teacher may have gone on meanwhile."""
        return {"method.teacher": self._checksum}


def head(dim: int, width: int, hidden: int | None) -> nn.Module:
    """From a student's width to the teacher's: one linear layer, or two with a GELU between."""
    layers = (
        [nn.Linear(dim, width)] if hidden is None else [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, width)]
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _spread(features: Tensor) -> Tensor:
    """How evenly the directions of features (b, d) spread: 1; 0: they are all one."""
    directions = F.normalize(features.float(), dim=-1)
    return directions.std(dim=0, unbiased=False).mean() * directions.shape[-1] ** 0.5
