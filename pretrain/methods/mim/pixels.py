"""Raw pixels as the target (SimMIM, Xie et al. 2022, section 3.4)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.encoders.base import refine
from pretrain.methods.mim.target import Target


class Pixels(Target):
    """The normalised pixels under each output token, with an L1 loss on the hidden ones; no per-patch statistics."""

    def __init__(self, stride: int, channels: int) -> None:
        super().__init__()
        self.cell, self.channels = stride, channels
        self.num_outputs = stride**2 * channels

    def to_image(self, predicted: Tensor) -> Tensor:
        """(b, h, w, c * stride * stride) -> (b, c, H, W): SimMIM's pixel shuffle."""
        return rearrange(predicted, "b h w (c p q) -> b c (h p) (w q)", c=self.channels, p=self.cell)

    def wanted(self, images: Tensor, batch: Batch) -> Tensor:
        return images

    def loss(
        self, head: nn.Module, cells: Tensor, wanted: Tensor, batch: Batch, mean_hidden: Tensor
    ) -> dict[str, Tensor]:
        hidden = _hidden_pixels(wanted, batch)
        error = ((self.to_image(head(cells)).float() - wanted).abs() * hidden).sum()
        pixels_per_unit = hidden[0, 0].numel() / batch["token_mask"][0].numel()
        return {"loss": error / (mean_hidden * pixels_per_unit + 1e-5) / self.channels}

    def packed_loss(self, predicted: Tensor, wanted: Tensor, mean_hidden: Tensor) -> Tensor:
        own = rearrange(predicted.float(), "n (c pixels) -> n (pixels c)", c=self.channels)
        return (own - wanted).abs().sum() / (mean_hidden * self.cell**2 + 1e-5) / self.channels

    def pictures(self, predicted: Tensor, images: Tensor, batch: Batch) -> Tensor | None:
        return torch.where(_hidden_pixels(images, batch), self.to_image(predicted).float(), images)


def _hidden_pixels(images: Tensor, batch: Batch) -> Tensor:
    """(b, 1, H, W) bool."""
    return rearrange(refine(batch["token_mask"], (images.shape[2], images.shape[3])), "b h w -> b 1 h w")
