"""Image-text contrast: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), FLIP (Li et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.saved import save_encoder
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Beside, Method, Normalisation, mask_of
from pretrain.methods.clip.captions import DrawnCaptions, captions_of, vocabulary_of
from pretrain.methods.clip.config import ClipConfig
from pretrain.methods.clip.losses import Contrast, Whole, gathered, infonce, log_sums, siglip
from pretrain.methods.mask_counts import mask_grid, num_hidden
from pretrain.stream.from_host import from_host, on_host
from pretrain.text.saved import TextCard, save_text
from pretrain.text.tower import TextTower

MOST_SCALE = 100.0
#: What cosines are multiplied by at the start, and what is added to them then: CLIP's, and SigLIP's.
START_SCALE = {"infonce": 1 / 0.07, "siglip": 10.0}
START_BIAS = -10.0


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Clip:
    """Image-text contrast around the configuration's encoder, with the captions of its data."""
    assert config.encoder is not None
    method, size = config.method, config.views.global_size
    captions = captions_of(config)
    drawn = DrawnCaptions(captions, vocabulary_of(config, captions), method.tower.context, config.seed)
    num_visible = None
    if method.mask is not None:
        grid = mask_grid(method.mask, size)
        num_visible = grid[0] * grid[1] - num_hidden(method.mask, grid)
    encoder = build_encoder(config.encoder, size, config.data.channels)
    return Clip(method, encoder, drawn, num_visible, normalisation, timeline)


class Clip(Method):
    """Images and captions in one space, where each image is near its own caption and far from those of others.

    The loss is that of the global batch, with the gradients of it, however ranks and micro-batches divide it. With
    several micro-batches a step each is therefore encoded twice, first without gradients; see `losses`.
    """

    def __init__(
        self,
        config: ClipConfig,
        encoder: Encoder,
        captions: DrawnCaptions,
        num_visible: int | None,
        normalisation: Normalisation,
        timeline: Timeline,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.captions, self.num_visible = config, captions, num_visible
        self.encoder = encoder
        vocabulary = captions.vocabulary
        self.text = TextTower(config.tower, vocabulary.size, config.embed_dim, vocabulary.end)
        self.image_projection = nn.Linear(encoder.dim, config.embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=encoder.dim**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(START_SCALE[config.loss])]))
        self.logit_bias = nn.Parameter(torch.tensor([START_BIAS])) if config.loss == "siglip" else None
        self._looking: list[Tensor] | None = None
        self._scale = torch.ones(())
        self._whole: Whole | None = None  # of a step of several micro-batches
        self._done = 0  # of these

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.text.blocks()]

    def bounds(self, name: str) -> tuple[float, float] | None:
        return (0.0, math.log(MOST_SCALE)) if name == "logit_scale" else None

    def pinned(self) -> dict[str, str]:
        return {"vocabulary": self.captions.vocabulary.checksum}

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        self._whole = None
        if len(micro_batches) == 1:
            return
        self._looking = []
        for batch in micro_batches:
            look(batch)
        own = torch.cat(self._looking)
        self._looking, self._done = None, 0
        self._whole = self._whole_of(own, self._scale)

    def after_step(self, step: int, took: Tensor | None = None) -> None:
        super().after_step(step, took)
        self._whole = None

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, texts, pooled = self._embedded(batch, step)
        scale = self.logit_scale.float().exp().squeeze(0)
        if self._looking is not None:
            self._looking.append(torch.cat([images, texts], dim=1).detach())
            self._scale = scale.detach().clone()
            return {"loss": (images.sum() + texts.sum() + scale) * 0.0}
        found = self._contrast(images, texts, scale)
        with torch.no_grad():
            rows = F.normalize(pooled.float(), dim=-1)
            deviation = rows.std(dim=0, unbiased=False).mean() * rows.shape[-1] ** 0.5
        # feature_std, 1: the images' directions spread evenly; 0: collapsed
        return {
            "loss": found.loss,
            "matched": found.right,
            "logit_scale": scale.detach(),
            "feature_std": deviation,
        }

    def _embedded(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(b, e) fp32 of length 1 of images and of captions, and pooled features (b, d) of the images."""
        assert self.encoder is not None
        crops = batch["global_crops"][:, 0]
        tokens = self.captions.tokens(on_host(batch["ids"]), on_host(batch["rows"]), step)
        mask = None if self.config.mask is None else mask_of(batch, self.num_visible)
        pooled = self.encoder(self.normalise(crops), mask).pooled
        images = F.normalize(self.image_projection(pooled).float(), dim=1)
        texts = F.normalize(self.text(from_host(tokens, crops.device)).float(), dim=1)
        return images, texts, pooled

    def _contrast(self, images: Tensor, texts: Tensor, scale: Tensor) -> Contrast:
        whole, micro_batches = self._whole, self._done
        if whole is None:
            whole, micro_batches = self._whole_of(torch.cat([images, texts], dim=1).detach(), scale.detach()), 0
        else:
            self._done += 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        first = rank * (len(whole.images) // ranks) + micro_batches * len(images)
        if self.logit_bias is not None:
            return siglip(images, texts, first, whole, scale, self.logit_bias.float().squeeze(0))
        return infonce(images, texts, first, whole, scale)

    def _whole_of(self, own: Tensor, scale: Tensor) -> Whole:
        """Of this rank's embeddings (n, 2 e), images and texts side by side, and those of all others. Collective."""
        images, texts = gathered(own).chunk(2, dim=1)
        if self.config.loss == "siglip":
            return Whole(images, texts)
        own_images, own_texts = own.chunk(2, dim=1)
        sums = torch.stack([log_sums(own_images, texts, scale), log_sums(own_texts, images, scale)], dim=1)
        of_images, of_texts = gathered(sums).unbind(dim=1)
        return Whole(images, texts, of_images, of_texts)

    def beside_encoder(self) -> Beside:
        return Beside(self, self._write)

    def _write(self, folder: Path, weights: dict[str, Tensor], card: Any) -> None:
        encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
        save_encoder(folder, encoder, card)
        rest = {key: value for key, value in weights.items() if not key.startswith("encoder.")}
        save_text(folder, rest, self._card(), self.captions.vocabulary)

    def _card(self) -> TextCard:
        assert self.encoder is not None
        return TextCard(self.config.tower, self.config.embed_dim, self.encoder.dim, self.config.loss, self.config.text)
