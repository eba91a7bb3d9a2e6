"""Readers of official checkpoints of the family."""

from __future__ import annotations

import torch

from pretrain.encoders.layouts import CheckpointState, Imported, count, usual_heads
from pretrain.encoders.positions import nearest_on_line
from pretrain.encoders.timesformer.config import TimesformerConfig

#: Of the authors' configurations (SlowFast's defaults), of frames in 0 .. 1.
NORMALISATION = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))


def read_timesformer(state: CheckpointState) -> Imported:
    """{"model_state": names of timm's ViT, `temporal_*` and `time_embed`}, perhaps behind `model.`; or a ViT's.

    A ViT is a TimeSformer of attention=space_only. With attention=divided it is given what the authors' code gives
    it: in each block a temporal attention that is a copy of the spatial one, behind a `temporal_fc` of zeros.
    """
    state.drop_prefix("module.")
    state.drop_prefix("model.")
    state.leave(r"^(head|head_dist|fc_norm|pre_logits)\.", "a classifier's")
    tensors = state.tensors
    depth = count(tensors, r"blocks\.(\d+)\.")
    projection = state.get("patch_embed.proj.weight")
    dim, patch = projection.shape[0], projection.shape[-1]
    grid = state.patches(state.get("pos_embed").shape[1] - 1, "pos_embed")
    is_vit = "time_embed" not in tensors
    stored = "space_only" if is_vit else "divided" if "blocks.0.temporal_fc.weight" in tensors else "joint"
    hidden = state.get("blocks.0.mlp.fc1.weight").shape[0]
    inferred = TimesformerConfig(
        dim=dim,
        depth=depth,
        heads=state.guess("heads", usual_heads(dim), f"from the width {dim}"),
        patch=patch,
        mlp_ratio=max(hidden // dim, 1),
        attention=stored,
        frames=state.guess("frames", 8, "there are no positions in time") if is_vit else tensors["time_embed"].shape[1],
    )
    wanted = state.config(inferred)
    if wanted.attention != stored:
        if not is_vit:
            raise ValueError(f"attention={wanted.attention}: these are weights of a TimeSformer of attention={stored}")
        _inflate(tensors, depth, wanted)
        state.notes.append(f"a ViT, made a TimeSformer of attention={wanted.attention} that sees the frames alike")
    elif not is_vit:
        tensors["time_embed"] = nearest_on_line(tensors["time_embed"], wanted.frames)
    imported = state.imported(inferred, grid, patch, "timm")
    if not is_vit:
        imported.normalisation = NORMALISATION
        imported.notes.append("mean .45 and std .225 of its pixels are guessed; give --mean and --std if wrong")
    return imported


def _inflate(tensors: dict[str, torch.Tensor], depth: int, config: TimesformerConfig) -> None:
    """Give a ViT's weights what a TimeSformer has beside them."""
    dim = tensors["pos_embed"].shape[-1]
    tensors["time_embed"] = torch.zeros(1, config.frames, dim)
    if config.attention != "divided":
        return
    for number in range(depth):
        block = f"blocks.{number}."
        for key in [key for key in tensors if key.startswith((f"{block}attn.", f"{block}norm1."))]:
            tensors[key.replace(block, f"{block}temporal_")] = tensors[key].clone()
        tensors[f"{block}temporal_fc.weight"] = torch.zeros(dim, dim)
        tensors[f"{block}temporal_fc.bias"] = torch.zeros(dim)
