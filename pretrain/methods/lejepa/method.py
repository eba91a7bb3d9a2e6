"""LeJEPA: views that agree, in a normal cloud (Balestriero and LeCun 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, Mask, build_encoder
from pretrain.encoders.base import several_passes
from pretrain.engines.schedules import Timeline
from pretrain.methods import sigreg
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.lejepa.config import LejepaConfig


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Lejepa:
    """LeJEPA around the configuration's encoder."""
    assert config.encoder is not None
    size, channels, frames = config.views.global_size, config.data.channels, config.data.frames
    encoder = build_encoder(config.encoder, size, channels, frames=frames)
    return Lejepa(config.method, encoder, config.train.batch_size, config.seed, normalisation, timeline)


class Lejepa(Method):
    """Every view is drawn to the mean of its image's global views; SIGReg keeps each view's batch a normal cloud.

    loss = weight x SIGReg + (1 - weight) x disagreement, over the global batch: SIGReg of each view, averaged over
    views, compares the rows of all ranks and micro-batches at once. With several micro-batches a step each is
    therefore encoded twice, first without gradients.
    """

    def __init__(
        self,
        config: LejepaConfig,
        encoder: Encoder,
        batch_size: int,
        seed: int,
        normalisation: Normalisation,
        timeline: Timeline,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.encoder = encoder
        self.projector = projector(encoder.dim, config)
        self._whole: Tensor | None = None  # `waves` of all rows of a step, where that has several micro-batches
        self._looking: list[Tensor] | None = None

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        self._whole = None
        if len(micro_batches) == 1:
            return
        self._looking = []
        for batch in micro_batches:
            look(batch)
        self._whole = sigreg.over_ranks(torch.stack(self._looking).mean(dim=0))
        self._looking = None

    def after_step(self, step: int, took: Tensor | None = None) -> None:
        super().after_step(step, took)
        self._whole = None

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        embedded, pooled = self._embedded(batch)
        slices = sigreg.directions(self.seed, step, embedded.shape[-1], self.config.slices, embedded.device)
        places, normal, weights = self._knots(embedded.device)
        own = sigreg.waves(embedded, slices, places)
        if self._looking is not None:
            self._looking.append(own.detach())
            return {"loss": own.sum() * 0.0}
        whole = sigreg.over_ranks(own) if self._whole is None else self._whole
        spread = sigreg.epps_pulley(own, whole, normal, weights, float(self.batch_size)).mean()
        middle = embedded[: self.config.views].mean(dim=0)
        disagreement = (embedded - middle).square().mean()
        loss = self.config.weight * spread + (1 - self.config.weight) * disagreement
        with torch.no_grad():
            rows = F.normalize(pooled[: embedded.shape[1]].float(), dim=-1)
            deviation = rows.std(dim=0, unbiased=False).mean() * rows.shape[-1] ** 0.5
        # feature_std, 1: the first global crops' directions spread evenly; 0: collapsed
        return {"loss": loss, "sigreg": spread, "disagreement": disagreement, "feature_std": deviation}

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(v, b, d) fp32 embeddings of each view, global ones first, and pooled features (v * b, e) of all."""
        crops = self.normalise(batch["global_crops"][:, : self.config.views])
        passes: list[tuple[Tensor, Mask | None]] = [(rearrange(crops, "b v c h w -> (v b) c h w"), None)]
        if "local_crops" in batch:
            passes.append((rearrange(self.normalise(batch["local_crops"]), "b u c h w -> (u b) c h w"), None))
        pooled = torch.cat([features.pooled for features in several_passes(self.encoder, tuple(passes))])
        return rearrange(self.projector(pooled).float(), "(v b) d -> v b d", b=len(crops)), pooled

    def _knots(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return sigreg.knots(0.0, self.config.furthest_knot, self.config.knots, device)

    def statistic_of_a_point(self) -> float:
        """SIGReg of embeddings that are all zero."""
        places, normal, weights = self._knots(torch.device("cpu"))
        waves = torch.stack([torch.ones_like(places), torch.zeros_like(places)])
        point = rearrange(waves, "c t -> c 1 t")
        return float(sigreg.epps_pulley(point, point, normal, weights, float(self.batch_size)))


def projector(dim: int, config: LejepaConfig) -> nn.Sequential:
    """(n, dim) -> (n, projector_dim): an MLP with two hidden layers, each normalised before its ReLU."""
    layers: list[nn.Module] = []
    if config.embedding_dim is not None:
        layers.append(nn.Linear(dim, config.embedding_dim))
        dim = config.embedding_dim
    hidden = config.projector_hidden_dim
    for width in (dim, hidden):
        norm = nn.LayerNorm(hidden) if config.projector_norm == "layer" else BatchNormOverRanks(hidden)
        layers += [nn.Linear(width, hidden), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, config.projector_dim))


class BatchNormOverRanks(nn.BatchNorm1d):
    """Batch normalisation of (n, d) over the rows of this call on all ranks, equally many on each."""

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            return super().forward(rows)
        with torch.autocast(rows.device.type, enabled=False):
            values = rows.float()
            own = values.mean(dim=0)
            spread = (values - own).square().mean(dim=0)
            mean, spread, square = _MeanOverRanks.apply(torch.stack([own, spread, own.square()]))
            variance = spread + (square - mean.square()).clamp_min(0.0)  # within ranks, and between them
            with torch.no_grad():
                share = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance, share)
                self.num_batches_tracked.add_(1)
            normed = (values - mean) * (variance + self.eps).rsqrt()
            return normed * self.weight + self.bias


class _MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over all ranks, in both directions: the loss is a mean over them too."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return sigreg.over_ranks(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total
