"""Readers of official checkpoints of the family."""

from __future__ import annotations

from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.hub import rename_hub
from pretrain.encoders.layouts import (
    COMPUTED,
    IMAGENET,
    INCEPTION,
    CheckpointState,
    Imported,
    count,
    simmim_encoder,
)


def read_beit(state: CheckpointState) -> Imported:
    """BEiT and BEiT v2: q_bias and v_bias, tables of relative positions, shared or one a block (fine-tuned);
    transformers' BeitModel."""
    state.leave(COMPUTED, "computed")
    rename_hub(state)
    head = {f"head.{key.partition('.')[2]}": value for key, value in state.take("lm_head.").items()}
    further = state.take("cls_pt_layers.")  # of version 2, whose pixels are normalised as ImageNet's
    head |= {f"aggregation.blocks.{key.partition('.')[2]}": value for key, value in further.items()}
    state.leave("^cls_pt_lm_head", "a second vocabulary layer; ours shares one")
    imported = _beit(state)
    imported.method |= head
    imported.normalisation = IMAGENET if further else INCEPTION
    return imported


def _beit(state: CheckpointState) -> Imported:
    state.leave(COMPUTED, "computed")
    state.leave(r"^head\.", "a classifier's")
    mask_token = state.tensors.pop("mask_token", None)
    projection = state.get("patch_embed.proj.weight")
    dim, patch = projection.shape[0], projection.shape[-1]
    shared = "rel_pos_bias.relative_position_bias_table" in state.tensors
    prefix = "rel_pos_bias" if shared else "blocks.0.attn"
    table = state.get(f"{prefix}.relative_position_bias_table")
    grid = state.window(table, "relative_position_bias_table", patch)
    config = BeitConfig(
        dim=dim,
        depth=count(state.tensors, r"blocks\.(\d+)\."),
        heads=table.shape[1],
        patch=patch,
        relative_positions="shared" if shared else "per_block",
        absolute_positions="pos_embed" in state.tensors,
        layer_scale=0.1 if "blocks.0.gamma_1" in state.tensors else None,
        pooled_norm="fc_norm.weight" in state.tensors and "norm.weight" not in state.tensors,
        norm_eps=state.known("norm_eps", 1e-6),
    )
    imported = state.imported(config, grid, patch, "mim")
    imported.mask_token = mask_token
    return imported


def read_simmim(state: CheckpointState) -> Imported:
    """SimMIM's ViT, which is BEiT-like; `decoder.0` is the head."""
    head = simmim_encoder(state)
    imported = _beit(state)
    imported.method |= head
    return imported


def read_timm(state: CheckpointState) -> Imported:
    """A timm BEiT."""
    imported = _beit(state)
    imported.method_name, imported.normalisation = "timm", INCEPTION
    return imported
