"""Readers of official checkpoints of the family."""

from __future__ import annotations

from typing import NamedTuple

from einops import rearrange
from torch import Tensor

from pretrain.encoders.layouts import CheckpointState, Imported, State, count, usual_heads
from pretrain.encoders.pvt.config import PvtConfig


def read_pvt(state: CheckpointState) -> Imported:
    """The official PVT v1 classifiers: patch_embedN, pos_embedN, blockN."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    num_stages = count(state.tensors, r"patch_embed(\d+)\.", first=1)
    stages = range(1, num_stages + 1)
    dims = tuple(state.get(f"patch_embed{stage}.proj.weight").shape[0] for stage in stages)
    sr = tuple(
        state.tensors[key].shape[-1] if (key := f"block{stage}.0.attn.sr.weight") in state.tensors else 1
        for stage in stages
    )
    ratios = tuple(
        state.get(f"block{stage}.0.mlp.fc1.weight").shape[0] / dim for stage, dim in zip(stages, dims, strict=True)
    )
    patch = state.get("patch_embed1.proj.weight").shape[-1]
    config = PvtConfig(
        dims=dims,
        depths=tuple(count(state.tensors, rf"block{stage}\.(\d+)\.") for stage in stages),
        heads=state.guess("heads", tuple(usual_heads(dim) for dim in dims), "from the widths"),
        mlp_ratios=ratios,
        sr=sr,
        patch=patch,
    )
    grid = state.patches(state.get("pos_embed1").shape[1], "pos_embed1")
    return state.imported(config, grid, patch, "timm")


def read_um_mae(state: CheckpointState) -> Imported:
    """UM-MAE's PVT; see `take_um_mae`."""
    found = take_um_mae(state)
    config = PvtConfig(
        reduction="pool",
        dims=found.dims,
        depths=found.depths,
        heads=state.guess("heads", tuple(usual_heads(dim) for dim in found.dims), "from the widths"),
        mlp_ratios=found.mlp_ratios,
        patch=found.patch,
    )
    grid = state.patches(state.get("pos_embed").shape[1], "pos_embed")
    imported = state.imported(config, grid, found.patch, "mae")
    imported.mask_token, imported.method = found.mask_token, found.decoder
    return imported


class UmMae(NamedTuple):
    """What UM-MAE's checkpoints of both families hold: shapes by stage, and what belongs to its decoder."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    patch: int
    mask_token: Tensor | None
    decoder: State


def take_um_mae(state: CheckpointState) -> UmMae:
    """UM-MAE's own names: flat blocks with downsampling inside; its decoder's pixel shuffle ordered as ours."""
    state.drop_prefix("module.")
    state.leave("^decoder_pos_embed$", "fixed sin-cos positions, computed")
    mask_token = state.tensors.pop("vis_mask_token", None)
    if mask_token is not None:
        mask_token = rearrange(mask_token, "1 1 d -> 1 1 1 d")
    decoder = state.take("decoder_", "mask_token")
    for name in ("decoder_embed.weight", "decoder_embed.bias"):
        if name in decoder:  # torch's PixelShuffle has the channel first, ours the position
            decoder[name] = rearrange(decoder[name], "(c k) ... -> (k c) ...", k=4)
    state.leave(r"^head\.", "a classifier's")
    projection = state.get("patch_embed.proj.weight")
    dims, depths = [projection.shape[0]], [0]
    ratios: list[float] = []
    for block in range(count(state.tensors, r"blocks\.(\d+)\.")):
        dim = state.get(f"blocks.{block}.norm1.weight").shape[0]
        if f"blocks.{block}.downsample.proj.weight" in state.tensors:
            dims.append(dim)
            depths.append(0)
        depths[-1] += 1
        if depths[-1] == 1:
            ratios.append(state.get(f"blocks.{block}.mlp.fc1.weight").shape[0] / dim)
    return UmMae(tuple(dims), tuple(depths), tuple(ratios), projection.shape[-1], mask_token, decoder)
