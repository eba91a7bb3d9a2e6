"""Readers of official checkpoints of the family."""

from __future__ import annotations

from pretrain.encoders.layouts import CheckpointState, Imported
from pretrain.encoders.pvt.layouts import take_um_mae
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig


def read_um_mae(state: CheckpointState) -> Imported:
    """UM-MAE's Swin; see `take_um_mae`."""
    found = take_um_mae(state)
    starts = [sum(found.depths[:stage]) for stage in range(len(found.depths))]
    config = UmMaeSwinConfig(
        dim=found.dims[0],
        depths=found.depths,
        heads=tuple(state.get(f"blocks.{start}.attn.posmlp.2.weight").shape[0] for start in starts),
        patch=found.patch,
        position_dim=state.get("blocks.0.attn.posmlp.0.weight").shape[0],
    )
    window = state.guess("window", config.window, "as published")
    imported = state.imported(config, (1, 1), state.pixels(window * config.stride, "as published"), "mae")
    imported.mask_token, imported.method = found.mask_token, found.decoder
    return imported
