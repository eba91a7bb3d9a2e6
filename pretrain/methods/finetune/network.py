"""The head on an encoder: what it reads, and what it gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders import Encoder
from pretrain.methods.finetune.config import FinetuneConfig


class Head(nn.Module):
    """A linear layer on what stands for an image: logits, or standardised numbers, (b, k).

    Args:
        pool: See `FinetuneConfig`; None: the encoder's own pooled feature; map: each token by itself.
        fc_norm: Whether the encoder's last norm is applied after the mean, in place of before it.
    """

    def __init__(self, dim: int, outputs: int, pool: str | None, fc_norm: bool, init_std: float = 0.02) -> None:
        super().__init__()
        self.pool, self.fc_norm = pool, fc_norm
        self.fc = nn.Linear(dim, outputs)
        nn.init.trunc_normal_(self.fc.weight)
        self.fc.weight.data *= init_std
        nn.init.zeros_(self.fc.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled)


def classify(encoder: Encoder, head: Head, images: Tensor) -> Tensor:
    """(b, k) of normalised images (b, c, h, w); of a head that reads the map of tokens (b, k, h, w)."""
    features = encoder(images)
    if head.pool == "map":
        assert features.grid is not None
        logits = rearrange(head(features.tokens), "b (h w) k -> b k h w", h=features.grid[0])
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
    if head.fc_norm:
        assert features.states is not None
        num_prefix = 0 if features.prefix_tokens is None else features.prefix_tokens.shape[1]
        pooled = encoder.final_norm(features.states[:, num_prefix:].mean(dim=1))
    elif head.pool == "class":
        if features.prefix_tokens is None:
            raise ValueError(f"method.pool is class, and {type(encoder).__name__} has no class token: set it to mean")
        pooled = features.prefix_tokens[:, 0]
    elif head.pool == "mean":
        pooled = features.tokens.mean(dim=1)
    else:
        pooled = features.pooled
    return head(pooled)


def head_for(config: FinetuneConfig, dim: int, outputs: int) -> Head:
    """A fresh head of so many outputs."""
    pool = "map" if config.task == "segmentation" else config.pool
    return Head(dim, outputs, pool, config.fc_norm, config.head_init_std)


@torch.no_grad()
def reset_norm(encoder: Encoder) -> None:
    """Begin the last norm anew, which is used after the mean and was trained before it."""
    norm = next((part for part in (getattr(encoder.inner(), name, None) for name in ("norm", "fc_norm")) if part), None)
    if isinstance(norm, nn.LayerNorm):
        norm.reset_parameters()
