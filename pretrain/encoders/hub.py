"""What the Hub's models (transformers) call the parts of a vision transformer, and what their configuration tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.encoders.layouts import CheckpointState

#: In the order in which they are applied: names of files, which keep those of version 4, and of version 5's modules.
NAMES = (
    (r"^(?:dinov2|dinov2_with_registers|vit|beit|ijepa)\.", ""),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^decoder\.", ""),
    (r"^decoder_(?:layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^(?:encoder\.)?layers?\.", "blocks."),
    (r"^(?:encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"(?:\.attention\.attention)?\.relative_position_bias\.(relative_position_\w+)$", r".attn.\1"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
)
#: What the configuration calls what we ask of it.
SETTINGS = {
    "heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "mlp": "hidden_act",
    "rope_theta": "rope_theta",
}
KINDS: dict[str, Any] = {"heads": int, "norm_eps": (int, float), "mlp": str, "rope_theta": (int, float)}
MARK = r"(^|\.)embeddings\.(patch_embeddings|cls_token)"


def rename_hub(state: CheckpointState) -> bool:
    """Bring the names of transformers' vision transformers to timm's; False, and nothing done, where there are none."""
    if not any(re.search(MARK, key) for key in state.tensors):
        return False
    state.leave(r"(^|\.)pooler\.dense\.", "a pooler that its features are not read from")
    state.leave(r"^classifier\.", "a classifier's")
    for theirs, ours in NAMES:
        state.rename(theirs, ours)
    join(state, r"^(.*\.attn)\.(query|key|value)\.(weight|bias)$", _joined_attention)
    join(state, r"^(.*\.mlp)\.(gate_proj|up_proj)\.(weight|bias)$", _joined_gate)
    return True


def join(state: CheckpointState, pattern: str, joined: Any) -> None:
    """Replace keys that match (module, part, kind) by what `joined` makes of a module's {(part, kind): Tensor}."""
    found: dict[str, dict[tuple[str, str], Tensor]] = {}
    for key in list(state.tensors):
        if match := re.match(pattern, key):
            found.setdefault(match[1], {})[match[2], match[3]] = state.tensors.pop(key)
    for module, parts in found.items():
        state.tensors |= {f"{module}.{name}": value for name, value in joined(module, parts).items()}


def side_by_side(module: str, parts: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Of `q_proj`, `k_proj` and `v_proj`, each with a bias, the `qkv` that timm has; for `join`."""
    missing = [f"{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias") if (name, kind) not in parts]
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]} of {module}.self_attn")
    return {f"attn.qkv.{kind}": torch.cat([parts[name, kind] for name in "qkv"]) for kind in ("weight", "bias")}


def _joined_attention(module: str, parts: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values side by side; BEiT's, whose keys have no bias, as timm has them."""
    names = ("query", "key", "value")
    missing = [name for name in names if (name, "weight") not in parts]
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]} of {module}")
    whole = {"qkv.weight": torch.cat([parts[name, "weight"] for name in names])}
    biases = {name: parts[name, "bias"] for name in names if (name, "bias") in parts}
    if set(biases) == {"query", "value"}:
        return {**whole, "q_bias": biases["query"], "v_bias": biases["value"]}
    none = parts["query", "weight"].new_zeros(len(parts["query", "weight"]))
    return {**whole, "qkv.bias": torch.cat([biases.get(name, none) for name in names])}


def _joined_gate(module: str, parts: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    kinds = {kind for _, kind in parts}
    return {f"fc1.{kind}": torch.cat([parts["gate_proj", kind], parts["up_proj", kind]]) for kind in kinds}


def told_by(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's config.json and preprocessor_config.json tell, in our words.

    Of: model_type, the names of SETTINGS, image_size (h, w px), normalisation (mean, std). Nothing where it is no model
    of transformers. Raises ValueError for what can't be such a value.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return {}
    inner = config.get("vision_config")
    own = inner if isinstance(inner, Mapping) else config
    told: dict[str, Any] = {"model_type": kind}
    for name, theirs in SETTINGS.items():
        value = own.get(theirs)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, KINDS[name]) or (name != "mlp" and not value > 0):
            raise ValueError(f"the config.json beside it tells {theirs} {value!r}, which can't be")
        told[name] = value
    size = own.get("image_size")
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
        told["image_size"] = (sides[0], sides[1])
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if preprocessor.get("do_normalize", True) and _are_numbers(mean) and _are_numbers(std):
        told["normalisation"] = (tuple(map(float, mean)), tuple(map(float, std)))
    return told


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)


def activation(found: str) -> str:
    """The kind of MLP that a configuration tells; ValueError where ours have no such."""
    if found not in ("gelu", "quick_gelu"):
        raise ValueError(f"config.json tells hidden_act {found!r}; our ViT's MLPs have gelu or quick_gelu")
    return found
