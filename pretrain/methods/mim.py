"""Masked image modelling with a mask token (BEiT, Bao et al. 2022; SimMIM, Xie et al. 2022)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.encoders import Encoder
from pretrain.encoders.base import zero_hidden_pixels
from pretrain.methods.base import Method, Normalisation, mask_of
from pretrain.schedules import Timeline
from pretrain.tokenizers.base import Target


class MaskedImageModelling(Method):
    """Replace units by a learned token, encode the whole image, and predict a target at the hidden ones."""

    def __init__(self, encoder: Encoder, target: Target, normalisation: Normalisation, timeline: Timeline) -> None:
        super().__init__(normalisation, timeline)
        self.encoder = encoder
        self.target = target
        self.head = nn.Linear(encoder.dim, target.num_outputs)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = self.normalise(batch["global_crops"][:, 0])
        mean_hidden = batch.get("mean_hidden")
        if mean_hidden is None:  # one rank, one micro-batch: the local count is the global one
            mean_hidden = batch["replaced"].sum()
        return {"loss": self.target.loss(self.predict(images, batch), images, batch, mean_hidden)}

    def predict(self, images: Tensor, batch: Batch) -> Tensor:
        """(b, h, w, outputs) at each output token of the encoder."""
        features = self.encoder(images, mask_of(batch))
        assert features.grid is not None
        return rearrange(self.head(features.tokens), "b (h w) o -> b h w o", h=features.grid[0])

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        crops = batch["global_crops"][:, 0]
        images = self.normalise(crops)
        pasted = self.target.pictures(self.predict(images, batch), images, batch)
        if pasted is None:
            return {}
        masked = self.to_pixels(zero_hidden_pixels(images, batch["replaced"]))
        rows = torch.stack([crops, masked, self.to_pixels(pasted)], dim=1)
        return {"reconstructions (image, input, output)": rearrange(rows, "b v c h w -> b c h (v w)")}
