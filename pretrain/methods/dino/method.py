"""Self-distillation with no labels (DINO, Caron et al. 2021), with DINOv2's additions (Oquab et al. 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from data_pipelines.transforms.config import MixedSizes
from pretrain.config import Config
from pretrain.encoders import Encoder, Features, Mask, build_encoder
from pretrain.encoders.attention_maps import attention_pictures
from pretrain.encoders.base import several_passes
from pretrain.encoders.native import PackedFeatures, PackedImages, PackedMask, joined
from pretrain.engines.schedules import Cosine, Schedule, Staircase, Timeline
from pretrain.methods import sigreg
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.dino.anchor import GramAnchor
from pretrain.methods.dino.config import DinoConfig
from pretrain.methods.dino.head import DinoHead
from pretrain.methods.dino.koleo import ClassFeatures, koleo_loss
from pretrain.methods.dino.losses import dino_loss, ibot_loss, moved_center, sinkhorn_tables
from pretrain.stream.from_host import from_host
from pretrain.stream.hidden import finer_index, hidden_index
from pretrain.stream.mixed_sizes import resized, sizes_of_step


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Dino:
    """DINO around a student and a teacher of the configuration's encoder."""
    method, size, channels = config.method, config.views.global_size, config.data.channels
    frames = config.data.frames
    assert config.encoder is not None
    encoder = build_encoder(config.encoder, size, channels, mask_token=method.ibot is not None, frames=frames)
    still = dataclasses.replace(config.encoder, drop_path=0.0)
    teacher = build_encoder(still, size, channels, frames=frames)
    anchor = None
    if method.gram is not None:
        anchor = GramAnchor(method.gram, build_encoder(still, size, channels, frames=frames))
    mixed = config.views.mixed_sizes
    return Dino(method, encoder, teacher, normalisation, timeline, config.seed, anchor, mixed)


class Dino(Method):
    """A student matches, on every crop, what its slow average (the teacher) says of the global crops.

    `encoder` and `teacher_encoder` are of one architecture; the teacher's has no drop path. The teacher stays fp32:
    in bf16 an average with momentum .996 would never move. With `config.ibot` the student sees some global crops with
    units hidden and also matches the teacher's patch tokens there. `anchor` is there with `config.gram`.
    """

    def __init__(
        self,
        config: DinoConfig,
        encoder: Encoder,
        teacher_encoder: Encoder,
        normalisation: Normalisation,
        timeline: Timeline,
        seed: int = 0,
        anchor: GramAnchor | None = None,
        mixed: Sequence[MixedSizes] = (),
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.seed, self.mixed = config, seed, mixed
        self.encoder = encoder
        self.head = DinoHead(encoder.dim, config)
        self.teacher = nn.ModuleDict({"encoder": teacher_encoder, "head": DinoHead(encoder.dim, config)})
        prototypes = {"center": self.head.num_prototypes}  # of each centre
        if config.ibot is not None:
            if config.ibot.separate_head:
                self.patch_head = DinoHead(encoder.dim, config, config.ibot)
                self.teacher["patch_head"] = DinoHead(encoder.dim, config, config.ibot)
            prototypes["patch_center"] = self._head("patch_head").num_prototypes
        self.anchor = anchor
        self.encoder_loaded()
        if anchor is not None and anchor.config.teacher is not None:
            anchor.start_from(anchor.config.teacher, normalisation)
        self.teacher.requires_grad_(False)
        for name, count in prototypes.items():
            self.register_buffer(name, torch.zeros(1, count))
        # teacher outputs of the micro-batches since the last step, summed for each centre one after the other, and
        # then how many they are; not part of a checkpoint (which is after a step)
        self.register_buffer("center_sums", torch.zeros(sum(prototypes.values()) + len(prototypes)), persistent=False)
        self.centers = prototypes
        self.teacher_temperature = _temperature(config, timeline)
        last = config.teacher_momentum if config.teacher_momentum_schedule == "constant" else 1.0
        self.momentum = Cosine(config.teacher_momentum, last, timeline.total_steps)
        self.class_features = ClassFeatures()

    def encoder_loaded(self) -> None:
        for name, slow in self.teacher.items():
            slow.load_state_dict(
                {key: value for key, value in getattr(self, name).state_dict().items() if key != "mask_token"}
            )
        if self.anchor is not None and self.anchor.config.teacher is None:
            self.anchor.encoder.load_state_dict(self.teacher["encoder"].state_dict())

    def train(self, mode: bool = True) -> Dino:
        super().train(mode)
        self.teacher.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        # of a head all but the last layer, whose output is kept anyway: to compute it twice would cost most
        heads = [self.head, *([self.patch_head] if hasattr(self, "patch_head") else [])]
        heads += [slow for name, slow in self.teacher.items() if name != "encoder"]
        encoders = [self.teacher["encoder"], *([] if self.anchor is None else [self.anchor.encoder])]
        slow = [block for encoder in encoders for block in encoder.blocks()]
        return [*super().blocks(), *slow, *(head.mlp for head in heads)]

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        if self.config.koleo_weight and self.config.koleo_over == "batch":
            self.class_features.begin(micro_batches, look)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        if self.mixed:
            batch = resized(batch, sizes_of_step(self.mixed, self.seed, step))
        images, local = self._crops(batch)
        size = len(batch["rows"] if isinstance(images, PackedImages) else batch["global_crops"])
        num_global = (len(images.grids) if isinstance(images, PackedImages) else len(images)) // size
        if self.class_features.looking:
            return self._look(batch, images, num_global * size)
        with torch.no_grad():
            teacher_features = self.teacher["encoder"](images)
            outputs = {"center": self.teacher["head"](teacher_features.pooled).float()}
        mask = hidden = None
        if self.config.ibot is not None:
            mask, hidden = self._mask(batch), hidden_index(batch)
            if not isinstance(images, PackedImages):
                assert teacher_features.grid is not None
                hidden = finer_index(hidden, batch["token_mask"].shape[2:], teacher_features.grid)
            with torch.no_grad():
                name = "patch_head" if "patch_head" in self.teacher else "head"
                outputs["patch_center"] = self.teacher[name](_rows(teacher_features.tokens, hidden)).float()
        targets = self._targets(outputs, step)
        seen = self._seen(images, local, mask)
        features = seen[0]
        student = rearrange(self.head(torch.cat([each.pooled for each in seen])).float(), "(v b) k -> v b k", b=size)

        probabilities = rearrange(targets["center"], "(v b) k -> v b k", v=num_global)
        scores = student / self.config.student_temperature
        result = {"loss": dino_loss(scores, probabilities, self.config.local_weight)}
        views = rearrange(features.pooled[: num_global * size], "(v b) d -> v b d", v=num_global)
        if self.config.koleo_weight:
            result["koleo"] = self._koleo(views)
        if self.config.sigreg_weight:
            result["sigreg"] = self._sigreg(views, step)
        if hidden is not None:
            lengths = images.lengths if isinstance(images, PackedImages) else None
            result["ibot"] = self._ibot(features, hidden, targets["patch_center"], lengths)
        if self.anchor is not None and self.anchor.is_on(step):
            result["gram"] = self._gram(self.anchor, features, batch, images)
        if len(result) > 1:
            result["dino"] = result["loss"]
            for name, weight in self._weights().items():
                if name in result:
                    result["loss"] = result["loss"] + weight * result[name]
        with torch.no_grad():
            entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(dim=-1).mean()
            directions = F.normalize(features.pooled[:size].float(), dim=-1)
            deviation = directions.std(dim=0, unbiased=False).mean() * directions.shape[-1] ** 0.5
        # feature_std, 1: the first global crops' directions spread evenly; 0: collapsed
        return {**result, "teacher_entropy": entropy, "feature_std": deviation}

    def _look(self, batch: Batch, images: Tensor | PackedImages, crops: int) -> dict[str, Tensor]:
        """Note the class features of the global crops, as the pass that is learned from will find them."""
        mask = None if self.config.ibot is None else self._mask(batch)
        pooled = self._seen(images, None, mask)[0].pooled[:crops]
        self.class_features.note(rearrange(pooled, "(v b) d -> v b d", b=len(batch["rows"])))
        return {"loss": pooled.sum() * 0.0}

    def _mask(self, batch: Batch) -> Mask | PackedMask:
        """What of the global crops, view by view, the student sees replaced."""
        if "global_patches" in batch:
            return PackedMask(token=batch["token_mask"])
        return Mask(token=rearrange(batch["token_mask"], "b v gh gw -> (v b) gh gw"))

    def _koleo(self, views: Tensor) -> Tensor:
        """KoLeo of class features (v, b, d), summed over views."""
        neighbours = self.config.koleo_neighbours
        if self.config.koleo_over == "batch":
            return self.class_features.koleo(views, neighbours)
        return torch.stack([koleo_loss(view, neighbours) for view in views]).sum()

    def _crops(self, batch: Batch) -> tuple[Tensor | PackedImages, Tensor | PackedImages | None]:
        """The global crops of a batch, normalised, view by view; and the local ones, where there are any."""
        if "global_patches" in batch:
            return self.packed(batch), self.packed(batch, "local") if "local_patches" in batch else None
        images = rearrange(self.normalise(batch["global_crops"]), "b v c h w -> (v b) c h w")
        if "local_crops" not in batch:
            return images, None
        return images, rearrange(self.normalise(batch["local_crops"]), "b u c h w -> (u b) c h w")

    def _seen(
        self, images: Tensor | PackedImages, local: Tensor | PackedImages | None, mask: Mask | PackedMask | None
    ) -> Sequence[Any]:
        """The student's features of all crops, in one pass or in one for each kind."""
        if isinstance(images, PackedImages):
            every = images if local is None else joined([images, local])
            if isinstance(mask, PackedMask):
                assert mask.token is not None
                rest = len(every.patches) - len(mask.token)  # nothing of local crops is hidden
                mask = PackedMask(token=F.pad(mask.token, (0, rest)))
            return [self.encoder(every, mask)]
        assert not isinstance(mask, PackedMask)
        passes: tuple[tuple[Tensor, Mask | None], ...] = ((images, mask),)
        if isinstance(local, Tensor):
            passes = (*passes, (local, None))
        return several_passes(self.encoder, passes)

    def _ibot(
        self, features: Features | PackedFeatures, hidden: Tensor, targets: Tensor, lengths: tuple[int, ...] | None
    ) -> Tensor:
        """The loss at the hidden patch tokens (n,), all global views together, from the teacher's `targets` (n, k).

        lengths: how many tokens each global crop has, where they have shapes of their own.
        """
        if lengths is None:
            num_crops, num_tokens = features.tokens.shape[:2]
            crops = hidden // num_tokens
        else:
            num_crops = len(lengths)
            crops = torch.bucketize(hidden, from_host(np.cumsum(lengths), hidden.device), right=True)
        counts = torch.zeros(num_crops, device=hidden.device).index_add_(0, crops, torch.ones_like(crops).float())
        student = self._head("patch_head")(_rows(features.tokens, hidden)).float() / self.config.student_temperature
        return ibot_loss(student, targets, 1.0 / counts.index_select(0, crops), num_crops)

    def _weights(self) -> dict[str, float]:
        """Of the terms beside DINO's own."""
        ibot, gram = self.config.ibot, self.config.gram
        weights = {"koleo": self.config.koleo_weight, "sigreg": self.config.sigreg_weight}
        return weights | ({"ibot": ibot.weight} if ibot else {}) | ({"gram": gram.weight} if gram else {})

    def _gram(self, anchor: GramAnchor, features: Features, batch: Batch, images: Tensor | PackedImages) -> Tensor:
        """The loss of the global crops' patches, all views together."""
        assert isinstance(images, Tensor)
        if "teacher_crops" in batch:
            images = rearrange(self.normalise(batch["teacher_crops"]), "b v c h w -> (v b) c h w")
        return anchor.loss(features, images)

    def _sigreg(self, views: Tensor, step: int) -> Tensor:
        """Of class features (v, b, d), averaged over views, in the form of DINOv3's FINO branch."""
        slices = sigreg.directions(self.seed, step, views.shape[-1], self.config.sigreg_slices, views.device)
        places, normal, weights = sigreg.knots(-5.0, 5.0, 17, views.device)
        own = sigreg.waves(views, slices, places)
        return sigreg.epps_pulley(own, sigreg.over_ranks(own), normal, weights).mean()

    def _head(self, name: str) -> DinoHead:
        """The class head, or the patch tokens' own where there is one."""
        return self.patch_head if name == "patch_head" and hasattr(self, "patch_head") else self.head

    @torch.no_grad()
    def _targets(self, outputs: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Teacher outputs (n, k) of each centre to probabilities; their sums are kept for the centres."""
        temperature = self.teacher_temperature(step)
        if self.config.centering == "sinkhorn":
            tables = sinkhorn_tables(list(outputs.values()), temperature, self.config.sinkhorn_iterations)
            return dict(zip(outputs, tables, strict=True))
        sums = [part.sum(dim=0) for part in outputs.values()]
        counts = [torch.full((1,), float(len(part)), device=part.device) for part in outputs.values()]
        self.center_sums.add_(torch.cat([*sums, *counts]))
        return {name: ((part - getattr(self, name)) / temperature).softmax(dim=-1) for name, part in outputs.items()}

    @torch.no_grad()
    def after_step(self, step: int, took: Tensor | None = None) -> None:
        super().after_step(step, took)
        self.class_features.end()
        if self.anchor is not None and self.anchor.is_copied(step + 1):
            self.anchor.follow(self.teacher["encoder"])
        if self.config.centering == "center":
            self._move_centers()

    def _move_centers(self) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.center_sums)
        *sums, counts = self.center_sums.split([*self.centers.values(), len(self.centers)])
        momentum = self.config.center_momentum
        for name, total, count in zip(self.centers, sums, counts, strict=True):
            center = getattr(self, name)
            center.copy_(moved_center(center, total, count, momentum))
        self.center_sums.zero_()

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(slow, getattr(self, name)) for name, slow in self.teacher.items()]

    def ema_momentum(self, step: int) -> float:
        return self.momentum(step)

    def frozen_encoder(self) -> Encoder | None:
        return self.teacher["encoder"]

    def frozen_until(self, name: str) -> int:
        if name.startswith(("head.last_layer", "patch_head.last_layer")):
            # the rate is zero, the gradient is not: Adam's moments are warm when it thaws. (From a gradient of zero
            # they would start cold with their bias corrections spent, and the first steps be several times too long.)
            return self.timeline.steps(self.config.freeze_last_layer_epochs)
        return 0

    def schedules(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum(step), "teacher_temperature": self.teacher_temperature(step)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        if "global_patches" in batch:
            return {}
        crops = batch["global_crops"][:, 0]
        return attention_pictures(self.teacher["encoder"], self.normalise(crops), crops, self.show, of="teacher")


def _temperature(config: DinoConfig, timeline: Timeline) -> Schedule:
    """The teacher's, from its warm-up's to the full one."""
    start, end = config.warmup_teacher_temperature, float(config.teacher_temperature)
    epochs = config.warmup_teacher_temperature_epochs
    if config.teacher_temperature_warmup == "linear":
        return Cosine(end, end, timeline.total_steps, timeline.steps(epochs), start)
    return Staircase(start, end, epochs, timeline.steps_per_epoch)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Of tokens (b, n, d), or (t, d) of images at their own shape, those (m, d) of the numbers (m,), counted image by
    image."""
    return tokens.flatten(0, -2).index_select(0, index)
