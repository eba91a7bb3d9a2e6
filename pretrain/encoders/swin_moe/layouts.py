"""Readers of official checkpoints of the family."""

from __future__ import annotations

import math

from einops import rearrange

from pretrain.encoders.layouts import COMPUTED, CheckpointState, Imported, count
from pretrain.encoders.swin_moe.config import SwinMoeConfig

_EXPERTS = "experts.batched_"


def read_swin_moe(state: CheckpointState) -> Imported:
    """The authors' Swin-MoE (microsoft/Swin-Transformer over tutel), with experts or without; of one saved by each
    rank, the `.master` file with its `.rank*` beside it (see `interop/checkpoint_file.py`)."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    tables = {key: table for key, table in state.tensors.items() if key.endswith("relative_coords_table")}
    state.leave(COMPUTED, "computed")
    state.leave(r"\._moe_layer\._num_global_experts$|\._moe_layer\.gates\.\d+\.(_|gate_noise)", "computed")
    num_stages = count(state.tensors, r"layers\.(\d+)\.")
    depths = tuple(count(state.tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(num_stages))
    heads = tuple(state.get(f"layers.{stage}.blocks.0.attn.cpb_mlp.2.weight").shape[0] for stage in range(num_stages))
    moe = [key.split(".") for key in state.tensors if "._moe_layer." in key]
    expert_blocks = tuple(
        tuple(sorted({int(parts[3]) for parts in moe if int(parts[1]) == stage})) for stage in range(num_stages)
    )
    told = _take_experts(state) if moe else {}
    projection = state.get("patch_embed.proj.weight")
    dim, patch = projection.shape[0], projection.shape[-1]
    dense = next((key for key in state.tensors if key.endswith(".mlp.fc1.weight")), None)
    if dense is not None:
        fc1 = state.tensors[dense]
        told["mlp_ratio"] = fc1.shape[0] / fc1.shape[1]
        told["fc2_bias"] = dense.replace("fc1.weight", "fc2.bias") in state.tensors
    windows = tuple(_window(tables.get(f"layers.{stage}.blocks.0.attn.relative_coords_table"), state, stage)
                    for stage in range(num_stages))  # fmt: skip
    config = SwinMoeConfig(
        dim=dim,
        depths=depths,
        heads=heads,
        patch=patch,
        window=max(windows),
        windows=windows,
        expert_blocks=expert_blocks,
        **told,
    )
    side = state.pixels(windows[-1] * patch * 2 ** (num_stages - 1), "the last stage is one window")
    return state.imported(config, (1, 1), side, "timm")


def _take_experts(state: CheckpointState) -> dict[str, object]:
    """Bring routers and experts to our names and shapes; what they tell of the configuration."""
    state.rename(r"\._moe_layer\.gates\.0\.", ".gate.")
    state.rename(r"\._moe_layer\.", ".")
    cosine = next((value for key, value in state.tensors.items() if key.endswith(".gate.sim_matrix")), None)
    linear = next((value for key, value in state.tensors.items() if key.endswith(".gate.wg.weight")), None)
    if cosine is None and linear is None:
        raise ValueError("it has experts and no router (gates.0.wg or gates.0.sim_matrix); a file of one rank, perhaps")
    told: dict[str, object] = {"experts": cosine.shape[1] if cosine is not None else linear.shape[0]}  # type: ignore[union-attr]
    if cosine is not None:
        told |= {"router": "cosine", "cosine_dim": cosine.shape[0]}
    biased = False
    for key in [key for key in state.tensors if f".mlp.{_EXPERTS}" in key]:
        before, _, name = key.partition(_EXPERTS)
        value = state.tensors.pop(key)
        shards = len(value) // int(told["experts"])  # type: ignore[call-overload]
        if not shards or len(value) % int(told["experts"]):  # type: ignore[call-overload]
            raise ValueError(
                f"{key} holds {len(value)} experts and the router knows {told['experts']}: give the .master file, "
                "with those of all ranks (.rank0, .rank1, ...) beside it"
            )
        if name == "fc1_w":  # a rank may hold a part of an expert's hidden units
            state.tensors[f"{before}experts.fc1.weight"] = rearrange(value, "(e s) h d -> e (s h) d", s=shards)
        elif name == "fc1_bias":
            flat = value.flatten(1)
            state.tensors[f"{before}experts.fc1.bias"] = rearrange(flat, "(e s) h -> e (s h)", s=shards)
        elif name == "fc2_w":
            state.tensors[f"{before}experts.fc2.weight"] = rearrange(value, "(e s) h d -> e d (s h)", s=shards)
        elif name == "fc2_bias" and not value.any():
            state.left[key] = "zero: trained without"
        elif name == "fc2_bias":
            biased = True
            flat = value.flatten(1)
            state.tensors[f"{before}experts.fc2.bias"] = rearrange(flat, "(e s) d -> e (s d)", s=shards)
        else:
            raise ValueError(f"{key} is no tensor of an expert that is known: fc1_w, fc1_bias, fc2_w, fc2_bias")
    for key in [key for key in state.tensors if key.endswith("experts.fc2.bias")]:  # ranks hold equally many of it
        width = state.tensors[key.replace(".bias", ".weight")].shape[1]
        state.tensors[key] = state.tensors[key][:, :width]
    weight = next(value for key, value in state.tensors.items() if key.endswith("experts.fc1.weight"))
    return {**told, "mlp_ratio": weight.shape[1] / weight.shape[2], "fc2_bias": biased}


def _window(table: object, state: CheckpointState, stage: int) -> int:
    """Side of a stage's windows, from the table of offsets (1, 2 w - 1, 2 w - 1, 2)."""
    if table is None:
        raise ValueError(f"it has no relative_coords_table in stage {stage}, which tells its windows")
    largest, side = float(table.max()), table.shape[1]  # type: ignore[attr-defined]
    if side > 1 and abs(largest - math.log2(9) / 3) > 1e-3:
        raise ValueError(
            f"stage {stage} has offsets scaled to the windows of an earlier pretraining (up to {largest:.3f}), which "
            "our Swin-MoE does not do; import the checkpoint of that pretraining"
        )
    return (side + 1) // 2
