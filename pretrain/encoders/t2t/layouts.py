"""Readers of official checkpoints of the family."""

from __future__ import annotations

from pretrain.encoders.layouts import CheckpointState, Imported, count
from pretrain.encoders.t2t.config import T2T_SIZES, T2tConfig


def read_t2t(state: CheckpointState) -> Imported:
    """The authors' classifiers, whose averaged weights (`state_dict_ema`) are taken where there are both."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    project = state.get("tokens_to_token.project.weight")
    dim, token_dim = project.shape[0], project.shape[1] // 9
    performer = "tokens_to_token.attention1.w" in state.tensors
    heads = {width: heads for width, _, heads, _ in T2T_SIZES.values()}.get(dim) or max(1, dim // 64)
    grid = state.patches(state.get("pos_embed").shape[1] - 1, "pos_embed")
    config = T2tConfig(
        dim=dim,
        depth=count(state.tensors, r"blocks\.(\d+)\."),
        heads=state.guess("heads", heads, f"from the width {dim}"),
        mlp_ratio=state.get("blocks.0.mlp.fc1.weight").shape[0] / dim,
        tokens="performer" if performer else "transformer",
        token_dim=token_dim,
    )
    return state.imported(config, grid, config.patch, "timm")
