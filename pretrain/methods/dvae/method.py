"""A discrete variational autoencoder (Ramesh et al. 2021, appendix A): the tokenizer of BEiT v1."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from data_pipelines.loader import Batch
from data_pipelines.rng import Purpose, stream_key
from pretrain.config import Config
from pretrain.engines.schedules import Cosine, Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.dvae.config import DvaeConfig
from pretrain.methods.dvae.network import (
    DvaeDecoder,
    DvaeEncoder,
    DvaeTokenizer,
    divergence_to_uniform,
    logit_laplace,
    map_pixels,
    residuals,
    unmap_pixels,
)
from pretrain.tokenizers.usage import CodeUsage, sum_over_ranks


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Dvae:
    """The dVAE of a configuration."""
    return Dvae(config.method, config.data.channels, normalisation, timeline, config.seed)


class Dvae(Method):
    """Write each place of an image as one code of a vocabulary, from which a decoder paints the image again.

    While it learns, a code is a softmax over the vocabulary with Gumbel noise, ever sharper. The encoder's slow average
    is what is saved. The noise depends on (seed, step, row of the global batch), not on how the batch is split.
    """

    def __init__(
        self, config: DvaeConfig, channels: int, normalisation: Normalisation, timeline: Timeline, seed: int
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.seed = config, seed
        self.network = DvaeEncoder(config, channels)
        self.decoder = DvaeDecoder(config, channels)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.usage = CodeUsage(config.vocab_size)
        self._seen: list[Tensor] | None = None  # sums of logits, while the first batch is looked at
        self.values_per_code = channels * self.network.stride**2
        total = timeline.total_steps
        self.temperature = Cosine(
            config.temperature, config.temperature_end, max(1, round(config.temperature_share * total))
        )
        self.warmup = max(1, round(config.kl_share * total))  # steps until the divergence has its full weight

    def kl_weight(self, step: int) -> float:
        """Of the divergence per code, as of optimizer step `step`."""
        return self.config.kl_weight * min(1.0, step / self.warmup)

    def blocks(self) -> list[nn.Module]:
        return [*residuals(self.network), *residuals(self.decoder)]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        mapped = map_pixels(batch["global_crops"][:, 0])
        logits = self.network(mapped).float()
        if self._seen is not None:
            count = logits.new_tensor([logits[:, 0].numel()])
            self._seen.append(torch.cat([reduce(logits, "b k h w -> k", "sum"), count]))
        noise = gumbel_noise(logits, batch["rows"], self.seed, step)
        shares = ((logits + noise) / self.temperature(step)).softmax(dim=1)
        likelihood = logit_laplace(mapped, *self.decoder(shares)).mean()
        divergence = divergence_to_uniform(logits)
        if self.training:
            self.usage.count(logits.argmax(dim=1))
        # the paper's bound per pixel value: summed, there is one code for `values_per_code` of them
        weight = self.kl_weight(step) / self.values_per_code
        return {
            "loss": likelihood + weight * divergence,
            "likelihood": likelihood.detach(),
            "divergence": divergence.detach(),
        }

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        if step or self.config.start == "published":
            return
        self._seen = []
        for batch in micro_batches:
            look(batch)
        sums = sum_over_ranks(torch.stack(self._seen).sum(dim=0))  # of the logits, and how many there were
        self._seen = None
        for network in (self.network, self.average):
            network.shift.copy_(sums[:-1] / sums[-1])
        self.usage.counts.zero_()

    @torch.no_grad()
    def after_step(self, step: int, took: Tensor | None = None) -> None:
        super().after_step(step, took)
        self.usage.close_step()

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.average, self.network)]

    def ema_momentum(self, step: int) -> float:
        return self.config.average_momentum

    def frozen_encoder(self) -> None:
        return None

    def tokenizer(self) -> DvaeTokenizer:
        return DvaeTokenizer(self.average)

    def schedules(self, step: int) -> dict[str, float]:
        scheduled = {"temperature": self.temperature(step), "kl_weight": self.kl_weight(step)}
        return scheduled | self.usage.values()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        crops = batch["global_crops"][:, 0]
        codes = self.network(map_pixels(crops)).argmax(dim=1)
        shares = rearrange(F.one_hot(codes, self.config.vocab_size).float(), "b h w k -> b k h w")
        location, _ = self.decoder(shares)
        mean, std = (rearrange(values, "c -> c 1 1") for values in (self.mean, self.std))
        painted = self.to_pictures((unmap_pixels(location.sigmoid()) - mean) / std, crops)
        return {"reconstructions (image, painted from its codes)": torch.cat([self.show(crops), painted], dim=-1)}


def gumbel_noise(like: Tensor, rows: Tensor, seed: int, step: int) -> Tensor:
    """Gumbel(0, 1) noise of the shape of `like` (b, ...): a function of (seed, step, row) for each row."""
    generator = torch.Generator(device=like.device)
    noise = torch.empty_like(like)
    for part, row in zip(noise, rows.tolist(), strict=True):
        part.exponential_(generator=generator.manual_seed(stream_key(seed, Purpose.GUMBEL, step, row) >> 1))
    return -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
