"""Self-distillation with no labels (DINO, Caron et al. 2021)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.encoders import Encoder
from pretrain.methods.base import Gathered, Method, Normalisation, already_whole, running_statistics
from pretrain.schedules import Cosine, Staircase, Timeline
from pretrain.schema import DinoConfig


class Dino(Method):
    """A student matches, on every crop, what its slow average (the teacher) says of the global crops.

    `encoder` and `teacher_encoder` are of one architecture; the teacher's has no drop path. The teacher stays fp32:
    in bf16 an average with momentum .996 would never move.
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
        self.teacher["encoder"].load_state_dict(encoder.state_dict())
        self.teacher["head"].load_state_dict(self.head.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, config.prototypes))
        # teacher outputs of the micro-batches since the last step, not part of a checkpoint (which is after a step)
        self.register_buffer("output_sum", torch.zeros(1, config.prototypes), persistent=False)
        self.register_buffer("output_count", torch.zeros(()), persistent=False)
        self.teacher_temperature = Staircase(
            config.warmup_teacher_temperature,
            config.teacher_temperature,
            config.warmup_teacher_temperature_epochs,
            timeline.steps_per_epoch,
        )
        self.momentum = Cosine(config.teacher_momentum, 1.0, timeline.total_steps)

    def train(self, mode: bool = True) -> Dino:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        crops = batch["global_crops"]
        views = rearrange(self.normalise(crops), "b v c h w -> v b c h w")
        num_global, images = len(views), rearrange(views, "v b c h w -> (v b) c h w")
        with torch.no_grad():
            teacher = self.teacher["head"](self.teacher["encoder"](images).pooled)
        features = self.encoder(images).pooled
        pooled = [features]
        if batch["local_crops"] is not None:
            small = rearrange(self.normalise(batch["local_crops"]), "b u c h w -> (u b) c h w")
            pooled.append(self.encoder(small).pooled)
        student = self.head(torch.cat(pooled))

        temperature = self.teacher_temperature(step)
        student = rearrange(student.float(), "(v b) k -> v b k", b=len(crops)) / self.config.student_temperature
        teacher = rearrange(teacher.float(), "(v b) k -> v b k", v=num_global)
        probabilities = ((teacher - self.center) / temperature).softmax(dim=-1)
        with torch.no_grad():
            self.output_sum += teacher.sum(dim=(0, 1))
            self.output_count += teacher.shape[0] * teacher.shape[1]
            entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(dim=-1).mean()
            directions = F.normalize(features[: len(crops)].float(), dim=-1)
            deviation = directions.std(dim=0, unbiased=False).mean() * directions.shape[-1] ** 0.5
        return {
            "loss": dino_loss(student, probabilities),
            "teacher_entropy": entropy,
            "feature_std": deviation,  # 1: the first global crops' directions spread evenly; 0: collapsed
        }

    @torch.no_grad()
    def after_step(self, step: int, gathered: Gathered = already_whole) -> None:
        super().after_step(step, gathered)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.output_sum)
            dist.all_reduce(self.output_count)
        momentum = self.config.center_momentum
        self.center.mul_(momentum).add_(self.output_sum / self.output_count, alpha=1 - momentum)
        self.output_sum.zero_()
        self.output_count.zero_()
        pairs = list(zip(self.teacher["encoder"].parameters(), self.encoder.parameters(), strict=True))
        pairs += zip(self.teacher["head"].parameters(), self.head.parameters(), strict=True)
        weight = 1 - self.momentum(step)
        for slow, fast in pairs:
            with gathered([slow, fast]):
                slow.lerp_(fast.to(slow.dtype), weight)
        statistics = (running_statistics(encoder) for encoder in (self.teacher["encoder"], self.encoder))
        for slow, fast in zip(*statistics, strict=True):
            slow.lerp_(fast, weight)

    def frozen_encoder(self) -> Encoder | None:
        return self.teacher["encoder"]

    def frozen_until(self, name: str) -> int:
        if name.startswith("head.last_layer"):
            # the rate is zero, the gradient is not: Adam's moments are warm when it thaws. (From a gradient of zero
            # they would start cold with their bias corrections spent, and the first steps be several times too long.)
            return self.timeline.steps(self.config.freeze_last_layer_epochs)
        return 0

    def schedules(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum(step), "teacher_temperature": self.teacher_temperature(step)}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        crops = batch["global_crops"][:, 0]
        images = self.normalise(crops)
        encoder = self.teacher["encoder"]
        attention = encoder.attention(images)
        if attention is not None:
            attention = attention / attention.amax(dim=(-2, -1), keepdim=True)
            maps = rearrange(_enlarged(attention, crops), "b heads h w -> b 1 h (heads w)")
            label = "attention of the teacher's class token, last block (image, then a head each)"
            return {label: torch.cat([crops, maps.expand(-1, crops.shape[1], -1, -1)], dim=-1)}
        if crops.shape[1] != 3:
            return {}
        features = encoder(images)
        few = features.grid is None or min(features.tokens[..., 0].numel(), features.tokens.shape[-1]) < 3
        if few or not features.tokens.isfinite().all():
            return {}  # no map, fewer than three directions, or a run that is about to stop with words of its own
        maps = rearrange(main_directions(features.tokens), "b (h w) c -> b c h w", h=features.grid[0])
        label = "tokens of the teacher (image, then their three main directions as red, green, blue)"
        return {label: torch.cat([crops, _enlarged(maps, crops)], dim=-1)}


def main_directions(tokens: Tensor) -> Tensor:
    """Tokens (b, n, d) along the three directions in which those of all images vary most: (b, n, 3) in 0 .. 1."""
    flat = rearrange(tokens.float(), "b n d -> (b n) d")
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    along = flat @ directions[:3].T
    low, high = along.amin(dim=0), along.amax(dim=0)
    return rearrange((along - low) / (high - low).clamp_min(1e-12), "(b n) c -> b n c", b=len(tokens))


def _enlarged(maps: Tensor, crops: Tensor) -> Tensor:
    """Maps (b, c, gh, gw) in 0 .. 1 as uint8 of the crops' height and width."""
    return (F.interpolate(maps, size=crops.shape[-2:], mode="nearest") * 255).to(torch.uint8)


def dino_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy between all (teacher view, student view) pairs but those of the same view, averaged over pairs.

    student (v, b, k): outputs divided by the student's temperature, global views first. teacher (g, b, k):
    probabilities. Gives a scalar (Caron et al. 2021, equation 3).
    """
    log_student = student.log_softmax(dim=-1)
    num_teacher, batch = teacher.shape[:2]
    # the sum over views first: no tensor of all pairs is ever made
    every = einsum(teacher.sum(dim=0), log_student.sum(dim=0), "b k, b k ->")
    same = einsum(teacher, log_student[:num_teacher], "g b k, g b k ->")
    num_pairs = num_teacher * (len(student) - 1)
    return (same - every) / (num_pairs * batch)


class DinoHead(nn.Module):
    """Three linear layers with GELU, l2-normalised, then a weight-normalised projection to the prototypes."""

    def __init__(self, dim: int, config: DinoConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.head_hidden),
            nn.GELU(),
            nn.Linear(config.head_hidden, config.head_hidden),
            nn.GELU(),
            nn.Linear(config.head_hidden, config.head_bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(config.head_bottleneck, config.prototypes, fixed_norm=config.norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, k)."""
        bottleneck = self.mlp(features)
        # cosines are divided by temperatures as low as .02: in bf16 their rounding alone would be worth .2 nats
        with torch.autocast(features.device.type, enabled=False):
            return self.last_layer(F.normalize(bottleneck.float(), dim=-1, eps=1e-12))


class WeightNormLinear(nn.Module):
    """y = g * v / |v| x without bias, its norms `weight_g` fixed at 1 if `fixed_norm` (Salimans and Kingma 2016)."""

    def __init__(self, dim: int, num_outputs: int, fixed_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(dim, num_outputs, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(num_outputs, 1), requires_grad=not fixed_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, k)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1, eps=0.0))
