"""Tiny models of transformers with random weights, and what an imported encoder makes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.encoders.saved import load_encoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
SHAPE = {**SIZES, "intermediate_size": 64}


def random_model(build: Any, config: Any) -> nn.Module:
    """With weights and norms moved away from where they start, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def everything(folder: Path, pixels: Tensor) -> Tensor:
    """(b, p + n, d) what the imported encoder makes of images: prefix tokens, then patches."""
    features = load_encoder(folder)[0](pixels)
    parts = [features.tokens] if features.prefix_tokens is None else [features.prefix_tokens, features.tokens]
    return torch.cat(parts, dim=1)
