"""Readers of official checkpoints of the family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from einops import rearrange

from pretrain.encoders.heads import dino_heads
from pretrain.encoders.hub import activation, rename_hub
from pretrain.encoders.layouts import INCEPTION, CheckpointState, Imported, count, is_square, usual_heads
from pretrain.encoders.patches import sincos_positions
from pretrain.encoders.positions import Interpolation
from pretrain.encoders.vit.config import VitConfig


def read_vit(
    state: CheckpointState,
    method: str,
    *,
    sincos: bool = False,
    eps: float = 1e-6,
    interpolation: Interpolation = "offset",
    mlp: str | None = None,
    heads: Mapping[int, int] | None = None,
) -> Imported:
    """timm's and DeiT's names, which MAE and DINO share.

    eps, interpolation: of the layout. mlp: gelu or quick_gelu; default: what a configuration tells. heads: by width,
    where they are others than a ViT's.
    """
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
    grid = state.patches(num_rows - num_prefix, "pos_embed", patch)
    kind, hidden = _mlp(state, mlp)
    config = VitConfig(
        dim=dim,
        depth=count(state.tensors, r"blocks\.(\d+)\."),
        heads=state.guess("heads", (heads or {}).get(dim) or usual_heads(dim), f"from the width {dim}"),
        patch=patch,
        positions="sincos" if sincos else "learned",
        class_token="cls_token" in state.tensors,
        distillation_token=distilled,
        registers=num_registers,
        pool="class" if "cls_token" in state.tensors and method != "mae" else "mean",
        layer_scale=1e-5 if any(key.endswith("ls1.gamma") for key in state.tensors) else None,
        hidden=None if hidden == 4 * dim else hidden,
        mlp=kind,
        pre_norm="norm_pre.weight" in state.tensors,
        norm_eps=state.known("norm_eps", eps),
        interpolation=interpolation,
    )
    return state.imported(config, grid, patch, method)


def _mlp(state: CheckpointState, activated: str | None) -> tuple[str, int]:
    """The kind of the MLPs and their inner width; a gate's two layers are brought into one, as timm has them."""
    state.rename(r"\.mlp\.w12\.", ".mlp.fc1.")
    state.rename(r"\.mlp\.w3\.", ".mlp.fc2.")
    first, last = (state.get(f"blocks.0.mlp.{name}.weight").shape for name in ("fc1", "fc2"))
    if first[0] == 2 * last[1]:
        return "swiglu", last[1]
    return activation(activated or state.known("mlp", "gelu")), last[1]


def _is_fixed(imported: Imported, rounding: float) -> bool:
    """Whether positions are the fixed sines and cosines of their grid, in the precision they were stored with."""
    rows, columns = (side // imported.encoder.patch for side in imported.image_size)
    if imported.encoder.shape[0] % 4:
        return False
    fixed = sincos_positions(imported.encoder.shape[0], (rows, columns))
    return torch.allclose(imported.weights["pos_embed"][:, -len(fixed) :], fixed[None], atol=max(1e-4, rounding))


def read_mae(state: CheckpointState) -> Imported:
    """{"model": timm's ViT names, decoder_*, mask_token of the decoder} (He et al. 2022); transformers' ViTMAE."""
    hub = rename_hub(state)
    state.leave("^decoder_pos_embed$", "fixed sin-cos positions, computed")
    decoder = state.take("decoder_", "mask_token")
    imported = read_vit(state, "mae", sincos=True, interpolation="bicubic" if hub else "offset")
    if not _is_fixed(imported, state.rounding):
        imported.encoder = dataclasses.replace(imported.encoder, positions="learned")
    imported.method = decoder
    return imported


def read_dino(state: CheckpointState) -> Imported:
    """{"student", "teacher"}, each backbone.* and head.*, or a backbone alone; iBOT's; transformers' ViT."""
    heads = dino_heads(state.backbone(), state.left)
    hub = rename_hub(state)
    mask_token = state.tensors.pop("masked_embed", None)  # iBOT's
    imported = read_vit(state, "dino", interpolation="bicubic" if hub else "offset")
    imported.method = heads
    if mask_token is not None:
        imported.mask_token = rearrange(mask_token, "1 d -> 1 1 d")
    return imported


def read_dinov2(state: CheckpointState) -> Imported:
    """A released backbone, or {"teacher": backbone.*, dino_head.*, ibot_head.*}, blocks perhaps in chunks; or
    transformers' Dinov2 and Dinov2WithRegisters."""
    heads = dino_heads(state.backbone(), state.left)
    state.rename(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")  # blocks.CHUNK.N of training checkpoints
    hub = rename_hub(state)
    mask_token = state.tensors.pop("mask_token", None)
    smooth = "register_tokens" in state.tensors
    imported = read_vit(state, "dino", interpolation="antialias" if smooth else "bicubic" if hub else "offset")
    imported.method = heads
    if mask_token is not None:
        imported.mask_token = rearrange(mask_token, "... d -> 1 1 (... d)")
    return imported


def read_ijepa(state: CheckpointState) -> Imported:
    """{"encoder", "target_encoder", "predictor"} (Assran et al. 2023); transformers' IJepa."""
    own = "target_encoder." if state.which == "teacher" else "encoder."
    predictor = state.take("predictor.")
    hub = rename_hub(state)
    if not hub:
        state.keep(own, f"not of the {state.which}'s encoder")
    imported = read_vit(state, "ijepa", sincos=True, interpolation="bicubic" if hub else "offset")
    if not _is_fixed(imported, state.rounding):
        imported.encoder = dataclasses.replace(imported.encoder, positions="learned")
    for name, value in predictor.items():
        name = name.removeprefix("predictor.").removeprefix("predictor_")
        if name == "pos_embed":
            imported.left["predictor.predictor_pos_embed"] = "fixed sin-cos positions, computed"
        else:
            imported.method[f"predictor.{name}"] = value
    return imported


def read_timm(state: CheckpointState) -> Imported:
    """A timm ViT or DeiT."""
    if "norm_pre.weight" not in state.tensors:
        return read_vit(state, "timm")
    mlp = state.guess("mlp", "gelu", "as in most towers of CLIP; timm's *_quickgelu_* and OpenAI's have quick_gelu")
    return read_vit(state, "timm", eps=1e-5, mlp=mlp)


def read_transformers(state: CheckpointState) -> Imported:
    """transformers' ViT, whose released weights are a classifier's (google/vit-*)."""
    if not rename_hub(state):
        raise ValueError(
            "no key is named as transformers' ViT names it (embeddings.patch_embeddings); is it another (--as)?"
        )
    imported = read_vit(state, "vit", interpolation="bicubic")
    imported.normalisation = INCEPTION
    return imported
