"""Readers of checkpoints of the family."""

from __future__ import annotations

import math

import torch
from einops import rearrange

from pretrain.encoders.layouts import CheckpointState, Imported, count
from pretrain.encoders.navit.config import NavitConfig


def read_navit(state: CheckpointState) -> Imported:
    """The names of vit-pytorch's NaViT, whose patches are flattened channel by channel."""
    state.leave(r"\.beta$", "a bias of a norm that stays zero")
    state.leave(r"^mlp_head\.", "a classifier's")
    weight = state.get("to_patch_embedding.1.weight")
    dim, pixels = weight.shape
    tables = [state.get(f"pos_embed_{side}") for side in ("height", "width")]
    patch = next((math.isqrt(pixels // c) for c in (3, 1) if c * math.isqrt(pixels // c) ** 2 == pixels), None)
    if patch is None:
        raise ValueError(f"its patches have {pixels} numbers, which are no square of pixels of 3 channels or 1")
    heads = state.get("transformer.layers.0.0.q_norm.gamma").shape[0]
    hidden = state.get("transformer.layers.0.1.1.weight").shape[0]
    config = NavitConfig(
        dim=dim,
        depth=count(state.tensors, r"transformer\.layers\.(\d+)\."),
        heads=heads,
        patch=patch,
        pool="attention",
        mlp_ratio=hidden / dim,
    )
    gamma = state.tensors["to_patch_embedding.0.gamma"]
    state.tensors["to_patch_embedding.0.gamma"] = rearrange(gamma, "(c p q) -> (p q c)", p=patch, q=patch)
    state.tensors["to_patch_embedding.1.weight"] = rearrange(weight, "d (c p q) -> d c p q", p=patch, q=patch)
    for key in [key for key in state.tensors if key.endswith(".to_kv.weight") and key.startswith("transformer.")]:
        query = state.tensors.pop(key.replace("to_kv", "to_q"))
        state.tensors[key.replace("to_kv", "qkv")] = torch.cat([query, state.tensors.pop(key)])
    for key in [key for key in state.tensors if key.endswith("_norm.gamma")]:
        state.tensors[key] = rearrange(state.tensors[key], "h 1 d -> h d")
    for pattern, ours in _NAMES:
        state.rename(pattern, ours)
    return state.imported(config, (len(tables[0]), len(tables[1])), patch, "navit")


_NAMES = (
    (r"^to_patch_embedding\.0\.gamma$", "patch_embed.norm1.weight"),
    (r"^to_patch_embedding\.1\.", "patch_embed.proj."),
    (r"^to_patch_embedding\.2\.gamma$", "patch_embed.norm2.weight"),
    (r"^pos_embed_height$", "pos_embed_rows"),
    (r"^pos_embed_width$", "pos_embed_columns"),
    (r"^attn_pool_queries$", "pool.query"),
    (r"^attn_pool\.", "pool."),
    (r"^pool\.to_(q|kv)\.", r"pool.\1."),
    (r"^transformer\.layers\.(\d+)\.0\.norm\.gamma$", r"blocks.\1.norm1.weight"),
    (r"^transformer\.layers\.(\d+)\.0\.", r"blocks.\1.attn."),
    (r"^transformer\.layers\.(\d+)\.1\.0\.gamma$", r"blocks.\1.norm2.weight"),
    (r"^transformer\.layers\.(\d+)\.1\.1\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.layers\.(\d+)\.1\.4\.", r"blocks.\1.mlp.fc2."),
    (r"^transformer\.norm\.gamma$", "norm.weight"),
    (r"\.to_out\.0\.weight$", ".proj.weight"),
    (r"_norm\.gamma$", "_norm.gain"),
    (r"\.norm\.gamma$", ".norm.weight"),
)
