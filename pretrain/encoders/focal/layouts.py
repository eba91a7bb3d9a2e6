"""Readers of official checkpoints of the family."""

from __future__ import annotations

import math
import re

from pretrain.encoders.focal.config import FocalConfig
from pretrain.encoders.layouts import CheckpointState, Imported, count, is_square, window_of

BIAS = "relative_position_bias_table"


def read_focal(state: CheckpointState) -> Imported:
    """The official Focal Transformer classifiers, which pool by a linear layer (`fc`)."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    state.leave(r"relative_position_index|valid_ind_|attn_mask", "computed")
    projection = state.get("patch_embed.proj.weight")
    stages = range(count(state.tensors, r"layers\.(\d+)\."))
    attentions = [f"layers.{stage}.blocks.0.attn" for stage in stages]
    tables = [state.get(f"{attention}.{BIAS}") for attention in attentions]
    windows = tuple(window_of(table) for table in tables)
    far = re.compile(rf"{re.escape(attentions[0])}\.{BIAS}_to_windows\.(\d+)$")
    levels = 1 + sum(far.match(key) is not None for key in state.tensors)
    config = FocalConfig(
        dim=projection.shape[0],
        depths=tuple(count(state.tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in stages),
        heads=tuple(table.shape[1] for table in tables),
        patch=4 if projection.shape[-1] == 7 else projection.shape[-1],
        windows=windows,
        expand=tuple(_expand(state, *found) for found in zip(attentions, windows, strict=True)),
        levels=levels,
        focal_windows=tuple(
            _focal_window(state, *found) if levels > 1 else 1 for found in zip(attentions, windows, strict=True)
        ),
        overlapping=projection.shape[-1] == 7,
        layer_scale=1e-4 if "layers.0.blocks.0.gamma_1" in state.tensors else None,
    )
    side = state.pixels(windows[-1] * config.stride, "the last stage is one window")
    return state.imported(config, (1, 1), side, "timm")


def _expand(state: CheckpointState, attention: str, window: int) -> int:
    """Tokens on each side of a window: 4 w^2 - 4 (w - e)^2 neighbours have a bias."""
    table = state.tensors.get(f"{attention}.{BIAS}_to_neighbors")
    if table is None:
        return 0
    inner = window**2 - table.shape[-1] // 4
    if table.shape[-1] % 4 or (inner and not is_square(inner)):
        raise ValueError(f"{attention} has biases of {table.shape[-1]} neighbours, which no ring of tokens is")
    return window - math.isqrt(inner)


def _focal_window(state: CheckpointState, attention: str, window: int) -> int:
    """Side in pooled windows: the table has the offsets of w tokens to f windows, (w + f - 1)^2."""
    entries = state.get(f"{attention}.{BIAS}_to_windows.0").shape[-1]
    if not is_square(entries) or math.isqrt(entries) < window:
        raise ValueError(f"{attention} has biases of {entries} offsets to pooled windows, which are of no square")
    return math.isqrt(entries) + 1 - window
