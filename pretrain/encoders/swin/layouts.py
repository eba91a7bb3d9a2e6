"""Readers of official checkpoints of the family."""

from __future__ import annotations

import math

from einops import rearrange

from pretrain.encoders.layouts import CheckpointState, Imported, State, count, simmim_encoder, window_of
from pretrain.encoders.swin.config import SwinConfig


def read_simmim(state: CheckpointState) -> Imported:
    """SimMIM's Swin, whose stages end with their downsampling; `decoder.0` is the head."""
    head = simmim_encoder(state)
    imported = _swin(state, "mim")
    imported.method |= head
    return imported


def read_timm(state: CheckpointState) -> Imported:
    """A timm Swin, or the official supervised one."""
    return _swin(state, "timm")


def _swin(state: CheckpointState, method: str = "mim") -> Imported:
    """The official names, where a stage ends with its downsampling, or timm's, where it begins with it."""
    state.leave(r"relative_position_index|attn_mask", "computed")
    state.leave(r"^head\.", "a classifier's")
    tables = state.tensors.copy()
    state.leave("relative_coords_table", "computed")
    if "layers.0.downsample.norm.weight" in state.tensors:
        state.rename(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample")
    if "absolute_pos_embed" in state.tensors:
        raise ValueError("it has absolute positions (absolute_pos_embed), which our Swin does not have")
    mask_token = state.tensors.pop("mask_token", None)
    if mask_token is not None:
        mask_token = rearrange(mask_token, "1 1 d -> 1 1 1 d")
    projection = state.get("patch_embed.proj.weight")
    num_stages = count(state.tensors, r"layers\.(\d+)\.")
    depths = tuple(count(state.tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(num_stages))
    version = 2 if "layers.0.blocks.0.attn.logit_scale" in state.tensors else 1
    key = "logit_scale" if version == 2 else "relative_position_bias_table"
    heads = tuple(
        state.get(f"layers.{stage}.blocks.0.attn.{key}").shape[0 if version == 2 else 1] for stage in range(num_stages)
    )
    first, last = (f"layers.{stage}.blocks.0.attn" for stage in (0, num_stages - 1))
    if version == 1:
        window, last_window = (window_of(state.get(f"{block}.relative_position_bias_table")) for block in (first, last))
    else:
        window, last_window = (_coordinates_window(state, tables, block) for block in (first, last))
    patch = projection.shape[-1]
    config = SwinConfig(
        version=version, dim=projection.shape[0], depths=depths, heads=heads, patch=patch, window=window
    )
    side = state.pixels(last_window * patch * 2 ** (num_stages - 1), "the last stage is one window")
    imported = state.imported(config, (1, 1), side, method)
    imported.mask_token = mask_token
    return imported


def _coordinates_window(state: CheckpointState, tables: State, block: str) -> int:
    """Side of the windows of a block of version 2, from the table of coordinates that official files hold."""
    table = tables.get(f"{block}.relative_coords_table")
    if table is None:  # timm's files: the window is the user's to tell, and the last stage's follows from the image
        if state.image_size is None or not any(override.startswith("window=") for override in state.overrides):
            raise ValueError(
                "the weights of this Swin v2 tell neither its window nor its image size; give those that its name "
                "says, such as window=8 --image-size 256 (names such as window12to16 are of models that ours is not)"
            )
        return 8
    # from -1 to 1 where the windows are those it was pretrained with: then x is sign(8 x) log2(|8 x| + 1) / 3
    if table.shape[1] > 1 and abs(float(table.max()) - math.log2(9) / 3) > 1e-3:
        raise ValueError(
            "its coordinates are scaled to the window of an earlier pretraining (as in 12to16), which our Swin does "
            "not do; import the checkpoint of that pretraining"
        )
    return (table.shape[1] + 1) // 2
