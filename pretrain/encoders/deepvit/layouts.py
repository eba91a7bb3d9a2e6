"""Readers of official checkpoints of the family."""

from __future__ import annotations

from pretrain.encoders.deepvit.config import DEEPVIT_SIZES, DeepVitConfig
from pretrain.encoders.layouts import CheckpointState, Imported, count


def read_deepvit(state: CheckpointState) -> Imported:
    """The authors' classifiers; what the weights do not tell is as published for their width."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    depth = count(state.tensors, r"blocks\.(\d+)\.")
    mixed = [number for number in range(depth) if f"blocks.{number}.attn.reatten_matrix.weight" in state.tensors]
    if mixed != list(range(depth - len(mixed), depth)):
        raise ValueError(f"its blocks {mixed} have re-attention; ours has it in the last blocks only")
    projection, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    dim, conv = projection.shape[0], "patch_embed.conv1.weight" in state.tensors
    published = {size[0]: size for size in DEEPVIT_SIZES.values()}.get(dim)
    heads = (
        state.get(f"blocks.{mixed[0]}.attn.reatten_matrix.weight").shape[0]
        if mixed
        else state.guess("heads", 12, "that of all published sizes")
    )
    patch = projection.shape[-1] * (2 if conv else 1)
    grid = state.patches(state.get("pos_embed").shape[1] - 1, "pos_embed")
    scaled = state.guess("reattention_scaled", published is not None and published[4], f"from the width {dim}")
    config = DeepVitConfig(
        dim=dim,
        depth=depth,
        heads=heads,
        reattention=len(mixed),
        reattention_scaled=scaled,
        branch_scale=state.guess("branch_scale", 0.5 if published else 1.0, f"from the width {dim}"),
        mlp_ratio=hidden.shape[0] / dim,
        stem="conv" if conv else "patch",
        patch=patch,
    )
    return state.imported(config, grid, patch, "timm")
