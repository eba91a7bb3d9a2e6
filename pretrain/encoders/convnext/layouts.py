"""Readers of official checkpoints of the family: ConvNeXt's and DINOv3's own, the Hub's (transformers), timm's."""

from __future__ import annotations

import re

import torch

from pretrain.encoders.convnext.config import ConvnextConfig
from pretrain.encoders.heads import dino_heads
from pretrain.encoders.layouts import CheckpointState, Imported, count


def read_convnext(state: CheckpointState) -> Imported:
    """facebookresearch/ConvNeXt and DINOv3's students, transformers' DINOv3ConvNextModel and ConvNextModel."""
    heads = dino_heads(state.backbone(), state.left)
    hub = any(".depthwise_conv." in key for key in state.tensors)
    if hub:
        _rename_hub(state)
    elif any(key.endswith(".layer_scale_parameter") for key in state.tensors):
        _rename_convnext_of_hub(state)
    else:
        for key in [key for key in state.tensors if re.match(r"norms\.3\.", key)]:
            if not torch.equal(state.tensors[key], state.get(f"norm.{key.rpartition('.')[2]}")):
                raise ValueError(
                    f"{key} differs from norm.{key.rpartition('.')[2]}; DINOv3's files hold one norm twice"
                )
        state.leave(r"^norms\.3\.", "the same as norm")
        state.leave(r"^head\.", "a classifier's")
        state.rename(r"^downsample_layers\.0\.", "stem.")
        state.rename(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.")
        state.rename(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.")
        state.rename(r"\.dwconv\.", ".conv_dw.")
        state.rename(r"\.pwconv([12])\.", r".mlp.fc\1.")
        state.rename(r"^norm\.", "head.norm.")
    imported = _convnext(state, "dino" if hub or heads else "timm")
    imported.method = heads
    return imported


def read_timm(state: CheckpointState) -> Imported:
    """A timm ConvNeXt."""
    state.leave(r"^head\.fc\.", "a classifier's")
    return _convnext(state, "timm")


def _rename_hub(state: CheckpointState) -> None:
    """transformers' names: a stage begins with its downsampling, the first with the stem."""
    state.drop_prefix("model.")
    state.rename(r"^stages\.0\.downsample_layers\.", "stem.")
    state.rename(r"^stages\.(\d+)\.downsample_layers\.", r"stages.\1.downsample.")
    state.rename(r"^stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2.")
    state.rename(r"\.depthwise_conv\.", ".conv_dw.")
    state.rename(r"\.layer_norm\.", ".norm.")
    state.rename(r"\.pointwise_conv([12])\.", r".mlp.fc\1.")
    state.rename(r"^layer_norm\.", "head.norm.")


def _rename_convnext_of_hub(state: CheckpointState) -> None:
    """transformers' names of ConvNeXt itself."""
    state.leave(r"^classifier\.", "a classifier's")
    state.drop_prefix("convnext.")
    state.rename(r"^embeddings\.patch_embeddings\.", "stem.0.")
    state.rename(r"^embeddings\.layernorm\.", "stem.1.")
    state.rename(r"^encoder\.", "")
    state.rename(r"\.downsampling_layer\.", ".downsample.")
    state.rename(r"^stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2.")
    state.rename(r"\.layer_scale_parameter$", ".gamma")
    state.rename(r"\.dwconv\.", ".conv_dw.")
    state.rename(r"\.layernorm\.", ".norm.")
    state.rename(r"\.pwconv([12])\.", r".mlp.fc\1.")
    state.rename(r"^layernorm\.", "head.norm.")


def _convnext(state: CheckpointState, method: str) -> Imported:
    """timm's names."""
    if any(".grn." in key for key in state.tensors):
        raise ValueError(
            "its MLPs normalise responses (ConvNeXt V2's grn), which our ConvNeXt does not; name it timm:NAME"
        )
    stages = range(count(state.tensors, r"stages\.(\d+)\."))
    state.get("head.norm.weight")
    patch = state.get("stem.0.weight").shape[-1]
    if patch not in (1, 4):
        raise ValueError(f"its first patches are {patch} px wide; ours are 1 or 4")
    config = ConvnextConfig(
        patch=patch,
        dims=tuple(state.get(f"stages.{stage}.blocks.0.norm.weight").shape[0] for stage in stages),
        depths=tuple(count(state.tensors, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in stages),
        layer_scale=1e-6 if "stages.0.blocks.0.gamma" in state.tensors else None,
    )
    return state.imported(config, (1, 1), state.pixels(224, "no table of positions tells it"), method)
