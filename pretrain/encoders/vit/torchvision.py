"""Reader of torchvision's vision transformers."""

from __future__ import annotations

from pretrain.encoders.layouts import CheckpointState, Imported
from pretrain.encoders.vit.layouts import read_vit

NAMES = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)


def read_torchvision(state: CheckpointState) -> Imported:
    """torchvision's VisionTransformer."""
    state.leave(r"^heads\.", "a classifier's")
    for theirs, ours in NAMES:
        state.rename(theirs, ours)
    return read_vit(state, "torchvision")
