"""A ViT on images at their own shape: each with its own class token, and positions interpolated to its own grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from pretrain.encoders.native import Interleaved, PackedFeatures, PackedImages, PackedMask, mean_of_each
from pretrain.encoders.packed import merged, sequence_paths

if TYPE_CHECKING:
    from pretrain.encoders.vit.encoder import VitEncoder


def encode(encoder: VitEncoder, images: PackedImages, mask: PackedMask, layers: tuple[int, ...]) -> PackedFeatures:
    """What `encoder` makes of images at their own shape; as of a batch of each by itself."""
    tokens, prefix = _embedded(encoder, images, mask)
    lengths = images.lengths if mask.kept is None else mask.lengths
    if mask.kept is not None:
        tokens = tokens.index_select(0, mask.kept)
    packing = Interleaved(lengths, prefix.shape[0], tokens.device)
    states = encoder.vit.norm_pre(packing.joined(repeat(prefix, "p d -> (n p) d", n=len(lengths)), tokens))
    groups, wanted, kept = merged(packing.lengths), [index % encoder.depth for index in layers], {}
    paths = sequence_paths(encoder.vit.blocks, packing.lengths, tokens.device)
    for index, (block, path) in enumerate(zip(encoder.vit.blocks, paths, strict=True)):
        states = block(states, path, groups)
        if index in wanted:
            kept[index] = states

    def features_of(at: Tensor) -> PackedFeatures:
        first, own = packing.split(encoder.vit.norm(at))
        prefix_tokens = rearrange(first, "(n p) d -> n p d", n=len(lengths)) if len(first) else None
        if encoder.pool == "class":
            assert prefix_tokens is not None
            pooled = prefix_tokens[:, : encoder.num_pooled].mean(dim=1)
        else:
            pooled = mean_of_each(own, lengths)
        return PackedFeatures(own, lengths, images.grids, mask.kept, pooled, prefix_tokens)

    earlier = tuple(features_of(kept[index]) for index in wanted)
    return features_of(states)._replace(layers=earlier)


def _embedded(encoder: VitEncoder, images: PackedImages, mask: PackedMask) -> tuple[Tensor, Tensor]:
    """Tokens (t, d) with their positions, and prefix tokens (p, d) with theirs."""
    if encoder.overlapping:
        raise ValueError(
            "a convolutional stem reads beyond patches, so it takes no packed ones; set encoder.stem=patch"
        )
    projection = encoder.vit.patch_embed.proj
    weight = rearrange(projection.weight, "d c p q -> d (p q c)")
    tokens = F.linear(images.patches, weight, projection.bias)
    if mask.token is not None:
        assert encoder.mask_token is not None, "built without mask_token, so no unit can be replaced"
        token = encoder.mask_token.to(tokens.dtype).view(-1)
        tokens = torch.where(rearrange(mask.token, "t -> t 1"), token, tokens)
    positions = {grid: encoder.positions(grid) for grid in dict.fromkeys(images.grids)}
    tokens = tokens + torch.cat([positions[grid][1][0] for grid in images.grids])
    prefix = tokens[:0]
    if encoder.vit.num_prefix_tokens:
        prefix = encoder.prefix(1, positions[images.grids[0]][0])[0]
    return tokens, prefix
