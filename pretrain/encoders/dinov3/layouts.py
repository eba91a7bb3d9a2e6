"""Readers of official checkpoints of the family: DINOv3's own, the Hub's (transformers), timm's."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from pretrain.encoders.dinov3.config import SIZES, Dinov3Config
from pretrain.encoders.heads import dino_heads
from pretrain.encoders.layouts import CheckpointState, Imported, count
from pretrain.encoders.position_settings import RotaryPositions
from pretrain.encoders.rotary import periods

#: Images that no table of positions tells of, in tokens a side: 256 px of patches of 16, as the released ones began.
USUAL_GRID = 16


def read_dinov3(state: CheckpointState) -> Imported:
    """facebookresearch/dinov3: a backbone, or {"teacher": backbone.*, heads}; or transformers' DINOv3ViTModel."""
    heads = dino_heads(state.backbone(), state.left)
    if any(key.startswith("embeddings.") for key in state.tensors):
        _rename_hub(state)
    else:
        state.rename(r"^storage_tokens$", "reg_token")
        state.rename(r"\.ls([12])\.gamma$", r".gamma_\1")
        for ours, theirs in (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")):
            state.rename(rf"\.mlp\.{theirs}\.", f".mlp.{ours}.")
    _split_bias(state)
    mask_token = state.tensors.pop("mask_token", None)
    imported = _dinov3(state, "dino")
    imported.method = heads
    if mask_token is not None:
        imported.mask_token = rearrange(mask_token, "... d -> 1 1 (... d)")
    return imported


def read_timm(state: CheckpointState) -> Imported:
    """A timm Eva with DINOv3's parts."""
    if "pos_embed" in state.tensors or any("rope.freqs" in key for key in state.tensors):
        raise ValueError(
            "it is an Eva with positions of another kind than DINOv3's (pos_embed or rope.freqs); name it timm:NAME"
        )
    state.leave(r"^(head|fc_norm)\.", "a classifier's")
    return _dinov3(state, "timm")


def _rename_hub(state: CheckpointState) -> None:
    """transformers' names: queries, keys and values by themselves, `layer` or `model.layer`."""
    state.leave(r"^rope_embeddings\.|inv_freq$", "computed")
    state.drop_prefix("embeddings.")
    state.rename(r"^register_tokens$", "reg_token")
    state.rename(r"^patch_embeddings\.", "patch_embed.proj.")
    state.rename(r"^(model\.)?layer\.", "blocks.")
    state.rename(r"\.layer_scale([12])\.lambda1$", r".gamma_\1")
    state.rename(r"\.attention\.o_proj\.", ".attn.proj.")
    gated = any(".mlp.gate_proj." in key for key in state.tensors)
    names = {"gate_proj": "fc1_g", "up_proj": "fc1_x" if gated else "fc1", "down_proj": "fc2"}
    for theirs, ours in names.items():
        state.rename(rf"\.mlp\.{theirs}\.", f".mlp.{ours}.")
    for block in range(count(state.tensors, r"blocks\.(\d+)\.")):
        at = f"blocks.{block}.attention"
        state.get(f"{at}.q_proj.weight")
        parts = state.take(f"{at}.")
        state.tensors[f"blocks.{block}.attn.qkv.weight"] = torch.cat([parts[f"{at}.{w}_proj.weight"] for w in "qkv"])
        biases = {which: parts[f"{at}.{which}_proj.bias"] for which in "qkv" if f"{at}.{which}_proj.bias" in parts}
        if biases:
            none = torch.zeros_like(next(iter(biases.values())))
            state.tensors[f"blocks.{block}.attn.qkv.bias"] = torch.cat([biases.get(which, none) for which in "qkv"])


def _split_bias(state: CheckpointState) -> None:
    """From biases of queries, keys and values side by side to those of queries and values: the keys' is masked."""
    for key in [key for key in state.tensors if key.endswith(".attn.qkv.bias")]:
        bias = state.tensors.pop(key)
        of_query, of_key, of_value = bias.chunk(3)
        mask = state.tensors.pop(f"{key}_mask", None)
        if mask is not None:
            state.left[f"{key}_mask"] = "computed: ones, and zeros for the keys"
            if not torch.equal(mask, masked_keys(mask)):
                raise ValueError(f"{key}_mask is not ones with zeros for the keys, which are its middle third")
        elif of_key.any():
            raise ValueError(
                f"{key} has a bias of the keys that is not zero, which DINOv3's released models do not have"
            )
        state.tensors[key.replace("qkv.bias", "q_bias")] = of_query
        state.tensors[key.replace("qkv.bias", "v_bias")] = of_value


def masked_keys(mask: Tensor) -> Tensor:
    """Ones, and zeros in the middle third, of the shape of `mask`."""
    ones, zeros, _ = torch.ones_like(mask).chunk(3)
    return torch.cat([ones, torch.zeros_like(zeros), ones])


def _dinov3(state: CheckpointState, method: str) -> Imported:
    """timm's names."""
    tensors = state.tensors
    projection = state.get("patch_embed.proj.weight")
    dim, patch = projection.shape[0], projection.shape[-1]
    named = {size.dim: size.heads for size in SIZES.values()}
    lengths = tensors.pop("rope_embed.periods", None)
    if lengths is None:
        heads = state.guess("heads", named.get(dim, max(1, dim // 64)), f"from the width {dim}")
    else:
        heads = dim // (4 * len(lengths))
        state.left["rope_embed.periods"] = "computed"
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    hidden = state.get("blocks.0.mlp.fc1_g.weight" if gated else "blocks.0.mlp.fc1.weight").shape[0]
    activated = "silu" if gated else "gelu"
    if state.told.get("mlp", activated) != activated:
        raise ValueError(f"config.json tells hidden_act {state.told['mlp']!r}; our MLPs have gelu, and gated ones silu")
    config = Dinov3Config(
        dim=dim,
        depth=count(tensors, r"blocks\.(\d+)\."),
        heads=heads,
        hidden=hidden,
        mlp="swiglu" if gated else "gelu",
        patch=patch,
        registers=tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        rope=RotaryPositions(base=state.known("rope_theta", 100.0))
        if lengths is None
        else _rope(lengths, dim // heads),
        qkv_bias="blocks.0.attn.q_bias" in tensors,
        layer_scale=1e-5 if "blocks.0.gamma_1" in tensors else None,
        norm="layer" if "norm.bias" in tensors else "rms",
        norm_eps=state.guess("norm_eps", 1e-5, "that of the released models"),
        class_norm="cls_norm.weight" in tensors,
        local_class_norm="local_cls_norm.weight" in tensors,
    )
    state.get("norm.weight")
    grid = state.pixels(USUAL_GRID * patch, "no table of positions tells it") // patch
    return state.imported(config, (grid, grid), patch, method)


def _rope(lengths: Tensor, width: int) -> RotaryPositions:
    """The settings whose periods are `lengths`."""
    for dtype in ("fp32", "bf16"):
        found = RotaryPositions(dtype=dtype)
        if torch.allclose(periods(found, width).float(), lengths, rtol=1e-5):
            return found
    if len(lengths) > 1 and bool((lengths > 0).all()):
        base = float(lengths[1] / lengths[0]) ** len(lengths)
        for found in (
            RotaryPositions(base=round(base, 4)),
            RotaryPositions(base=None, periods=(float(lengths.min()), float(lengths.max()))),
        ):
            if torch.allclose(periods(found, width), lengths, rtol=1e-4):
                return found
    raise ValueError(
        f"rope_embed.periods {[round(float(value), 4) for value in lengths[:4]]} ... are no geometric progression"
    )
