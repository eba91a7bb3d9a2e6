"""Self-distillation with no labels (DINO, Caron et al. 2021), with DINOv2's additions (Oquab et al. 2024)."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, Features, Mask, build_encoder
from pretrain.encoders.attention_maps import attention_pictures
from pretrain.encoders.base import refine
from pretrain.engines.ema import Gathered, already_whole
from pretrain.engines.schedules import Cosine, Staircase, Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.dino.config import DinoConfig
from pretrain.methods.dino.head import DinoHead
from pretrain.methods.dino.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Dino:
    """DINO around a student and a teacher of the configuration's encoder."""
    method, size, channels = config.method, config.views.global_size, config.data.channels
    assert config.encoder is not None
    encoder = build_encoder(config.encoder, size, channels, mask_token=method.ibot is not None)
    teacher = build_encoder(dataclasses.replace(config.encoder, drop_path=0.0), size, channels)
    return Dino(method, encoder, teacher, normalisation, timeline)


class Dino(Method):
    """A student matches, on every crop, what its slow average (the teacher) says of the global crops.

    `encoder` and `teacher_encoder` are of one architecture; the teacher's has no drop path. The teacher stays fp32:
    in bf16 an average with momentum .996 would never move. With `config.ibot` the student sees some global crops with
    units hidden and also matches the teacher's patch tokens there.
    """

    def __init__(
        self,
        config: DinoConfig,
        encoder: Encoder,
        teacher_encoder: Encoder,
        normalisation: Normalisation,
        timeline: Timeline,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config = config
        self.encoder = encoder
        self.head = DinoHead(encoder.dim, config)
        self.teacher = nn.ModuleDict({"encoder": teacher_encoder, "head": DinoHead(encoder.dim, config)})
        prototypes = {"center": self.head.num_prototypes}
        if config.ibot is not None:
            if config.ibot.separate_head:
                self.patch_head = DinoHead(encoder.dim, config, config.ibot.prototypes)
                self.teacher["patch_head"] = DinoHead(encoder.dim, config, config.ibot.prototypes)
            prototypes["patch_center"] = self._head("patch_head").num_prototypes
        self.encoder_loaded()
        self.teacher.requires_grad_(False)
        for name, count in prototypes.items():
            self.register_buffer(name, torch.zeros(1, count))
            # teacher outputs of the micro-batches since the last step, not part of a checkpoint (which is after a step)
            self.register_buffer(f"{name}_sum", torch.zeros(1, count), persistent=False)
            self.register_buffer(f"{name}_count", torch.zeros(()), persistent=False)
        self.centers = tuple(prototypes)
        self.teacher_temperature = Staircase(
            config.warmup_teacher_temperature,
            config.teacher_temperature,
            config.warmup_teacher_temperature_epochs,
            timeline.steps_per_epoch,
        )
        self.momentum = Cosine(config.teacher_momentum, 1.0, timeline.total_steps)

    def encoder_loaded(self) -> None:
        for name, slow in self.teacher.items():
            slow.load_state_dict(
                {key: value for key, value in getattr(self, name).state_dict().items() if key != "mask_token"}
            )

    def train(self, mode: bool = True) -> Dino:
        super().train(mode)
        self.teacher.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        # of a head all but the last layer, whose output is kept anyway: to compute it twice would cost most
        heads = [self.head, *([self.patch_head] if hasattr(self, "patch_head") else [])]
        heads += [slow for name, slow in self.teacher.items() if name != "encoder"]
        return [*super().blocks(), *self.teacher["encoder"].blocks(), *(head.mlp for head in heads)]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        crops = batch["global_crops"]
        size, num_global = crops.shape[:2]
        images = rearrange(self.normalise(crops), "b v c h w -> (v b) c h w")
        with torch.no_grad():
            teacher_features = self.teacher["encoder"](images)
            teacher = self.teacher["head"](teacher_features.pooled).float()
        mask = None
        if self.config.ibot is not None:
            mask = Mask(token=rearrange(batch["token_mask"], "b v gh gw -> (v b) gh gw"))
        features = self.encoder(images, mask)
        pooled = [features.pooled]
        if "local_crops" in batch:
            small = rearrange(self.normalise(batch["local_crops"]), "b u c h w -> (u b) c h w")
            pooled.append(self.encoder(small).pooled)
        student = rearrange(self.head(torch.cat(pooled)).float(), "(v b) k -> v b k", b=size)

        probabilities = rearrange(self._targets(teacher, "center", step), "(v b) k -> v b k", v=num_global)
        result = {"loss": dino_loss(student / self.config.student_temperature, probabilities)}
        if self.config.koleo_weight:
            views = rearrange(features.pooled, "(v b) d -> v b d", v=num_global)
            result["koleo"] = torch.stack([koleo_loss(view) for view in views]).sum()
        if mask is not None:
            result["ibot"] = self._ibot(features, teacher_features, mask, step)
        if len(result) > 1:
            result["dino"] = result["loss"]
            result["loss"] = result["dino"] + self.config.koleo_weight * result.get("koleo", 0.0)
            if self.config.ibot is not None:
                result["loss"] = result["loss"] + self.config.ibot.weight * result["ibot"]
        with torch.no_grad():
            entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(dim=-1).mean()
            directions = F.normalize(features.pooled[:size].float(), dim=-1)
            deviation = directions.std(dim=0, unbiased=False).mean() * directions.shape[-1] ** 0.5
        # feature_std, 1: the first global crops' directions spread evenly; 0: collapsed
        return {**result, "teacher_entropy": entropy, "feature_std": deviation}

    def _ibot(self, features: Features, teacher: Features, mask: Mask, step: int) -> Tensor:
        """The loss at hidden patch tokens, all global views together."""
        assert mask.token is not None
        assert features.grid is not None
        hidden = rearrange(refine(mask.token, features.grid), "n h w -> n (h w)")
        weights = (1.0 / hidden.sum(dim=1, keepdim=True).clamp_min(1)).expand_as(hidden)[hidden]
        student = self._head("patch_head")(features.tokens[hidden]).float() / self.config.student_temperature
        with torch.no_grad():
            name = "patch_head" if "patch_head" in self.teacher else "head"
            outputs = self.teacher[name](teacher.tokens[hidden]).float()
            targets = self._targets(outputs, "patch_center", step)
        return ibot_loss(student, targets, weights, num_crops=len(hidden))

    def _head(self, name: str) -> DinoHead:
        """The class head, or the patch tokens' own where there is one."""
        return self.patch_head if name == "patch_head" and hasattr(self, "patch_head") else self.head

    @torch.no_grad()
    def _targets(self, outputs: Tensor, center: str, step: int) -> Tensor:
        """Teacher outputs (n, k) to probabilities; their sum is kept for the centre."""
        temperature = self.teacher_temperature(step)
        if self.config.centering == "sinkhorn":
            return sinkhorn_knopp(outputs, temperature, self.config.sinkhorn_iterations)
        getattr(self, f"{center}_sum").add_(outputs.sum(dim=0))
        getattr(self, f"{center}_count").add_(len(outputs))
        return ((outputs - getattr(self, center)) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def after_step(self, step: int, gathered: Gathered = already_whole) -> None:
        super().after_step(step, gathered)
        if self.config.centering == "center":
            for name in self.centers:
                self._move_center(name)

    def _move_center(self, name: str) -> None:
        total, count, center = (getattr(self, f"{name}{part}") for part in ("_sum", "_count", ""))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
            dist.all_reduce(count)
        if count > 0:
            momentum = self.config.center_momentum
            center.mul_(momentum).add_(total / count, alpha=1 - momentum)
        total.zero_()
        count.zero_()

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
        crops = batch["global_crops"][:, 0]
        return attention_pictures(self.teacher["encoder"], self.normalise(crops), crops, self.show, of="teacher")
