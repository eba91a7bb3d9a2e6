"""A ViT as timm's NaFlexViT has it: which settings fit, its arguments, and the weights by its names."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pretrain.encoders.base import Encoder
from pretrain.encoders.vit.config import VitConfig

#: Settings of a ViT that `recipe_of` tells, or that play no part in what is computed of an image.
TOLD = (
    "family", "size", "dim", "depth", "heads", "patch", "positions", "rotary", "class_token", "registers", "pool",
    "stem", "layer_scale", "interpolation", "drop_path",
)  # fmt: skip
TABLES = ("learned", "sincos", "sincos_1d")


def recipe_of(config: VitConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` whose NaFlexViT takes the weights of `state_of`."""
    dim, depth, heads = config.shape
    recipe: dict[str, Any] = {
        "model_name": "naflexvit_base_patch16_gap", "num_classes": 0, "in_chans": channels, "patch_size": config.patch,
        "embed_dim": dim, "depth": depth, "num_heads": heads, "init_values": config.layer_scale or 1.0,
        "class_token": config.class_token, "reg_tokens": config.registers, "fc_norm": False, "pos_embed": "none",
        "global_pool": "token" if config.pool == "class" else "avg",
    }  # fmt: skip
    if config.positions == "rotary":
        recipe |= {"rope_type": "dinov3", "rope_temperature": config.rotary.base, "rope_rotate_half": True}
    elif config.positions in TABLES:
        recipe |= {"pos_embed": "learned", "pos_embed_grid_size": [side // config.patch for side in image_size]}
        recipe["pos_embed_antialias"] = config.interpolation == "antialias"
    return recipe


def why_not(config: VitConfig) -> str | None:
    """What NaFlexViT does otherwise than an encoder of these settings; None: nothing."""
    if config.positions in TABLES and config.interpolation == "offset":
        return (
            f"stretches tables of positions (positions={config.positions}) over another grid otherwise than DINO's "
            "code, whose scale is (side + 0.1) / old side: the same weights would see other positions"
        )
    if config.positions not in (*TABLES, "rotary", "none") or config.stem != "patch":
        return f"has neither positions={config.positions} with stem={config.stem} nor our weights for them"
    plain = VitConfig()
    others = [field.name for field in fields(config) if field.name not in TOLD]
    changed = [name for name in others if getattr(config, name) != getattr(plain, name)]
    if changed and not config.distillation_token:
        return f"is told nothing of {', '.join(changed)} here, and these weights were trained with that"
    if config.distillation_token:
        return "has no distillation token"
    rope = config.rotary
    if config.positions == "rotary" and (rope.periods, rope.normalise, rope.dtype) != (None, "separate", "fp32"):
        return "has rotary positions of a base alone, of sides by themselves (normalise=separate), in fp32"
    return None


def state_of(encoder: Encoder) -> dict[str, Tensor]:
    """The weights by NaFlexViT's names."""
    state: dict[str, Tensor] = {}
    folded: dict[str, Tensor] = {}
    rotary = getattr(encoder.config, "positions", None) == "rotary"
    for key, value in encoder.inner().state_dict().items():
        name = re.sub(r"^patch_embed\.", "embeds.", re.sub(r"^(cls_token|reg_token)$", r"embeds.\1", key))
        if rotary:
            name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        if name == "embeds.proj.weight":
            value = rearrange(value, "d c p q -> d (p q c)")
        if key == "pos_embed":
            count = encoder.inner().num_prefix_tokens
            for token, where in (("cls_token", slice(1)), ("reg_token", slice(1, None))):  # which have none there
                beside, own = f"embeds.{token}", value[:, :count][:, where]
                own = value[:, :count] if encoder.inner().cls_token is None else own
                if getattr(encoder.inner(), token) is not None:
                    folded[beside] = own
            name, value = "embeds.pos_embed", rearrange(value[:, count:], "1 (h w) d -> 1 h w d", h=encoder.grid[0])
        state[name] = value.detach().to("cpu", torch.float32).contiguous().clone()
    if encoder.config.layer_scale is None:  # timm takes None for what its model has by default
        for block in range(encoder.depth):
            for branch in (1, 2):
                name = f"gamma_{branch}" if rotary else f"ls{branch}.gamma"
                state[f"blocks.{block}.{name}"] = torch.ones(encoder.dim)
    for name, positions in folded.items():
        state[name] = state[name] + positions.detach().cpu()
    return state
