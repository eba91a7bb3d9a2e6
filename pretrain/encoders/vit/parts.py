"""The norms and MLPs of a ViT's blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import QuickGELU, SwiGLUPacked
from torch import nn

from pretrain.encoders.vit.config import VitConfig


def norm_of(config: VitConfig) -> Callable[..., nn.Module]:
    """What builds a norm of a width."""
    return partial(nn.LayerNorm, eps=config.norm_eps)


def mlp_of(config: VitConfig) -> dict[str, Any]:
    """What timm's blocks make their MLPs of, and their norms within."""
    own: dict[str, Any] = {"mlp_ratio": config.mlp_ratio}
    own |= {"scale_attn_norm": True, "scale_mlp_norm": True} if config.inner_norm else {}
    if config.mlp == "swiglu":
        return {**own, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return {**own, "act_layer": QuickGELU if config.mlp == "quick_gelu" else nn.GELU}


def block_of(config: VitConfig) -> dict[str, Any]:
    """What timm's blocks are made of, but for width, heads and drop path."""
    return {"qkv_bias": True, "init_values": config.layer_scale, "norm_layer": norm_of(config), **mlp_of(config)}
