"""Heads of DINO and its kin by the names that our method gives them: `head.*`, and `patch_head.*` of patch tokens."""

from __future__ import annotations

import re

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

    The last layer is weight-normalised (`weight_g`, `weight_v`) or, as in DINOv3, plain (`weight`). What is no head's
    is noted in `left`.
    """
    found: State = {}
    for key, value in tensors.items():
        name = key
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        if re.match(r"(patch_)?head\.(mlp|last_layer)\.", name):
            found[name] = value
        else:
            left[key] = "of neither the backbone nor a head"
    return found
