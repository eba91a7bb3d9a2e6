"""Heads of DINO and its kin by the names that our method gives them: `head.*`, and `patch_head.*` of patch tokens."""

from __future__ import annotations

import re

import torch

from pretrain.encoders.unwrapped import State

NAMES = (
    (r"^(?:dino_head|projection_head)\.", "head."),
    (r"^ibot_head\.", "patch_head."),
    (r"^(head|patch_head)\.layers\.", r"\1.mlp."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)


def dino_heads(tensors: State, left: dict[str, str]) -> State:
    """What of `tensors` is a head, under our names: DINO's, DINOv2's and DINOv3's own, and lightly's.

    The last layer is weight-normalised (`weight_g`, `weight_v`) or, as in DINOv3, plain (`weight`). iBOT's own head has
    a second last layer for patch tokens: with a copy of the layers before it, that is a head of theirs. What is no
    head's is noted in `left`.
    """
    found: State = {}
    second: State = {}
    for key, value in tensors.items():
        name = key
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        if name.startswith("head.last_layer2."):
            second[name.replace("last_layer2", "last_layer")] = value
        elif re.match(r"(patch_)?head\.(mlp|last_layer)\.", name):
            found[name] = value
        else:
            left[key] = "of neither the backbone nor a head"
    if all(name in found and torch.equal(found[name], value) for name, value in second.items()):
        left |= dict.fromkeys((name.replace("last_layer", "last_layer2") for name in second), "the same as last_layer")
        return found
    layers = {name: value.clone() for name, value in found.items() if name.startswith("head.mlp.")}
    return found | {f"patch_{name}": value for name, value in (layers | second).items()}
