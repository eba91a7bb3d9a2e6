"""DINOv3's vision transformer on images at their own shape, whose patches lie one behind the other in one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor

from pretrain.encoders import rotary
from pretrain.encoders.native import (
    Interleaved,
    PackedFeatures,
    PackedImages,
    PackedMask,
    mean_of_each,
    projected,
    with_mask_token,
)
from pretrain.encoders.packed import merged, sequence_paths

if TYPE_CHECKING:
    from pretrain.encoders.dinov3.encoder import Dinov3Encoder


def encode(encoder: Dinov3Encoder, images: PackedImages, mask: PackedMask, layers: tuple[int, ...]) -> PackedFeatures:
    """What `encoder` makes of images at their own shape; as of a batch of each by itself."""
    vit, count = encoder.vit, encoder.num_prefix
    tokens = with_mask_token(projected(vit.patch_embed.proj, images.patches), encoder.mask_token, mask.token)
    lengths = images.lengths if mask.kept is None else mask.lengths
    if mask.kept is not None:
        tokens = tokens.index_select(0, mask.kept)
    packing = Interleaved(lengths, count, tokens.device)
    prefix = torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], dim=1)[0]
    states = packing.joined(repeat(prefix, "p d -> (n p) d", n=len(lengths)), tokens)
    turns = rotary.native_turns(
        encoder.config.rope, images.grids, mask.kept, packing, encoder.width, encoder.depth, states.device,
        encoder.training,
    )  # fmt: skip
    groups, wanted, kept = merged(packing.lengths), [index % encoder.depth for index in layers], {}
    paths = sequence_paths(vit.blocks, packing.lengths, states.device)
    for index, (block, turn, path) in enumerate(zip(vit.blocks, turns, paths, strict=True)):
        states = block(states, turn, path, groups)
        if index in wanted:
            kept[index] = states

    def features_of(at: Tensor) -> PackedFeatures:
        first, own = packing.split(at)
        first = (vit.cls_norm if encoder.config.class_norm else vit.norm)(first)
        own, prefix_tokens = vit.norm(own), rearrange(first, "(n p) d -> n p d", p=count)
        pooled = prefix_tokens[:, 0] if encoder.config.pool == "class" else mean_of_each(own, lengths)
        return PackedFeatures(own, lengths, images.grids, mask.kept, pooled, prefix_tokens)

    return features_of(states)._replace(layers=tuple(features_of(kept[index]) for index in wanted))
