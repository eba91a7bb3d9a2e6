"""Readers of official checkpoints of the family."""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange

from pretrain.encoders.layouts import CheckpointState, Imported, count, is_square, usual_heads
from pretrain.encoders.patches import sincos_positions
from pretrain.encoders.vit.config import VitConfig


def _vit(state: CheckpointState, method: str, *, sincos: bool = False) -> Imported:
    """timm's and DeiT's names, which MAE and DINO share."""
    tensors = state.tensors
    state.leave("relative_position_index", "computed")
    if "fc_norm.weight" in tensors and "norm.weight" not in tensors:
        raise ValueError("a fine-tuned classifier (fc_norm without norm); import the pretraining checkpoint")
    state.leave(r"^(head|head_dist|fc_norm|pre_logits)\.", "a classifier's")
    projection = state.get("patch_embed.proj.weight")
    dim, patch = projection.shape[0], projection.shape[-1]
    positions = state.get("pos_embed")
    if "register_tokens" in state.tensors:  # DINOv2's name; timm's has a position each, DINOv2's have none
        registers = state.tensors.pop("register_tokens")
        state.tensors["reg_token"] = registers
        zeros = torch.zeros_like(registers)
        state.tensors["pos_embed"] = torch.cat([positions[:, :1], zeros, positions[:, 1:]], dim=1)
    num_registers = state.tensors["reg_token"].shape[1] if "reg_token" in state.tensors else 0
    distilled = "dist_token" in state.tensors
    num_prefix = ("cls_token" in state.tensors) + distilled + num_registers
    num_rows = state.tensors["pos_embed"].shape[1]
    if not is_square(num_rows - num_prefix) and is_square(num_rows):  # DeiT III, timm's DINOv2 with registers
        zeros = positions.new_zeros(1, num_prefix, dim)
        state.tensors["pos_embed"] = torch.cat([zeros, state.tensors["pos_embed"]], dim=1)
        num_rows += num_prefix
    grid = state.patches(num_rows - num_prefix, "pos_embed")
    if any(".mlp.w12" in key for key in state.tensors):
        raise ValueError("its MLPs are SwiGLU (DINOv2 giant), which our ViT does not have")
    config = VitConfig(
        dim=dim,
        depth=count(state.tensors, r"blocks\.(\d+)\."),
        heads=state.guess("heads", usual_heads(dim), f"from the width {dim}"),
        patch=patch,
        positions="sincos" if sincos else "learned",
        class_token="cls_token" in state.tensors,
        distillation_token=distilled,
        registers=num_registers,
        pool="class" if "cls_token" in state.tensors and method != "mae" else "mean",
        layer_scale=1e-5 if any(key.endswith("ls1.gamma") for key in state.tensors) else None,
    )
    return state.imported(config, grid, patch, method)


def read_mae(state: CheckpointState) -> Imported:
    """{"model": timm's ViT names, decoder_*, mask_token of the decoder} (He et al. 2022)."""
    state.drop_prefix("module.")
    state.leave("^decoder_pos_embed$", "fixed sin-cos positions, computed")
    decoder = state.take("decoder_", "mask_token")
    imported = _vit(state, "mae", sincos=True)
    grid = tuple(side // imported.encoder.patch for side in imported.image_size)
    fixed = sincos_positions(imported.encoder.shape[0], grid)
    if not torch.allclose(imported.weights["pos_embed"][:, -len(fixed) :], fixed[None], atol=max(1e-4, state.rounding)):
        imported.encoder = dataclasses.replace(imported.encoder, positions="learned")
    imported.method = decoder
    return imported


def read_dino(state: CheckpointState) -> Imported:
    """{"student", "teacher"} with `module.` and `backbone.` prefixes and head.*, or a backbone alone."""
    state.drop_prefix("module.")
    head = {}
    if any(key.startswith("backbone.") for key in state.tensors):
        head = state.take("head.")
        state.drop_prefix("backbone.")
    imported = _vit(state, "dino")
    imported.method = head
    return imported


def read_dinov2(state: CheckpointState) -> Imported:
    """A released backbone, or {"teacher": backbone.*, dino_head.*, ibot_head.*}; blocks may be chunked."""
    for prefix in (f"{state.which}.backbone.", "backbone."):
        if any(key.startswith(prefix) for key in state.tensors):
            state.leave(r"(dino|ibot)_head\.|dino_loss|ibot_patch_loss", "a head of DINOv2's own layout")
            state.keep(prefix, f"not of the {state.which}'s backbone")
            break
    state.rename(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")  # blocks.CHUNK.N of training checkpoints
    mask_token = state.tensors.pop("mask_token", None)
    imported = _vit(state, "dino")
    if mask_token is not None:
        imported.mask_token = rearrange(mask_token, "... d -> 1 1 (... d)")
    return imported


def read_ijepa(state: CheckpointState) -> Imported:
    """{"encoder", "target_encoder", "predictor"}, each with `module.` (Assran et al. 2023)."""
    own = "target_encoder." if state.which == "teacher" else "encoder."
    predictor = state.take("predictor.")
    state.keep(own, f"not of the {state.which}'s encoder")
    state.drop_prefix("module.")
    imported = _vit(state, "ijepa", sincos=True)
    for name, value in predictor.items():
        name = name.removeprefix("predictor.").removeprefix("module.").removeprefix("predictor_")
        if name == "pos_embed":
            imported.left["predictor.predictor_pos_embed"] = "fixed sin-cos positions, computed"
        else:
            imported.method[f"predictor.{name}"] = value
    return imported


def read_timm(state: CheckpointState) -> Imported:
    """A timm ViT or DeiT."""
    return _vit(state, "timm")
