"""Readers of official checkpoints of the family."""

from __future__ import annotations

from pretrain.encoders.layouts import CheckpointState, Imported, count
from pretrain.encoders.shunted.config import ShuntedConfig


def read_shunted(state: CheckpointState) -> Imported:
    """The official Shunted Transformer classifiers: patch_embedN, blockN, normN."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    stages = range(1, 1 + count(state.tensors, r"block(\d+)\.", first=1))
    dims = tuple(state.get(f"norm{stage}.weight").shape[0] for stage in stages)
    blocks = [f"block{stage}.0" for stage in stages]
    reduced = [state.tensors.get(f"{block}.attn.sr1.weight") for block in blocks]
    stem = [key for key, value in state.tensors.items() if key.startswith("patch_embed1.conv.") and value.ndim == 4]
    config = ShuntedConfig(
        dims=dims,
        depths=tuple(count(state.tensors, rf"block{stage}\.(\d+)\.") for stage in stages),
        heads=state.guess("heads", tuple(max(2, dim // 32) for dim in dims), "a head is 32 wide"),
        mlp_ratios=tuple(
            state.get(f"{block}.mlp.fc1.weight").shape[0] / dim for block, dim in zip(blocks, dims, strict=True)
        ),
        sr=tuple(1 if weight is None else weight.shape[-1] for weight in reduced),
        stem_convolutions=len(stem) - 2,
    )
    return state.imported(config, (1, 1), state.pixels(224, "as published"), "timm")
