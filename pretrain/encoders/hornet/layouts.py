"""Readers of official checkpoints of the family."""

from __future__ import annotations

from pretrain.encoders.hornet.config import HorNetConfig
from pretrain.encoders.layouts import CheckpointState, Imported, count


def read_hornet(state: CheckpointState) -> Imported:
    """The official HorNet classifiers, with 7x7 convolutions or global filters."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    stem = state.get("downsample_layers.0.0.weight")
    stages = range(count(state.tensors, r"stages\.(\d+)\."))
    gated = [f"stages.{stage}.0.gnconv" for stage in stages]
    orders = tuple(1 + count(state.tensors, rf"{name}\.pws\.(\d+)\.") for name in gated)
    weights = [state.tensors.get(f"{name}.dwconv.complex_weight") for name in gated]
    filters = tuple(tuple(weight.shape[1:3]) for weight in weights if weight is not None)
    patch = stem.shape[-1]
    config = HorNetConfig(
        dim=stem.shape[0],
        depths=tuple(count(state.tensors, rf"stages\.{stage}\.(\d+)\.") for stage in stages),
        orders=orders,
        filter="global" if filters else "local",
        filters=filters or HorNetConfig.filters,
        patch=patch,
    )
    if filters:
        side = state.pixels(filters[-1][0] * config.stride, "as large as the last filters")
    else:
        side = state.pixels(224, "as published")
    return state.imported(config, (1, 1), side, "timm")
