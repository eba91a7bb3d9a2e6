"""A ViT on images at their own shape: each with its own class token, and positions interpolated to its own grid."""

from __future__ import annotations

from collections.abc import Sequence
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
from pretrain.encoders.places import Place

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
    places = _places(encoder, images, mask, packing)
    for index, (block, path, place) in enumerate(zip(encoder.vit.blocks, paths, places, strict=True)):
        states = block(states, path, groups, place)
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


def _places(
    encoder: VitEncoder, images: PackedImages, mask: PackedMask, packing: Interleaved
) -> Sequence[Place | None]:
    """For each block where the tokens lie, of positions that turn queries and keys."""
    config = encoder.config
    if config.positions != "rotary":
        return [None] * encoder.depth
    dim, _, heads = config.shape
    turns = rotary.native_turns(
        config.rotary, images.grids, mask.kept, packing, dim // heads, encoder.depth, images.patches.device,
        encoder.training,
    )  # fmt: skip
    return [Place(encoder.vit.num_prefix_tokens, (), None, turn) for turn in turns]


def _embedded(encoder: VitEncoder, images: PackedImages, mask: PackedMask) -> tuple[Tensor, Tensor]:
    """Tokens (t, d) with their positions, and prefix tokens (p, d) with theirs."""
    if encoder.overlapping:
        raise ValueError(
            "a convolutional stem reads beyond patches, so it takes no packed ones; set encoder.stem=patch"
        )
    tokens = projected(encoder.vit.patch_embed.proj, images.patches)
    tokens, prefix_positions = with_mask_token(tokens, encoder.mask_token, mask.token), None
    if encoder.vit.pos_embed is not None:
        positions = {grid: encoder.positions(grid) for grid in dict.fromkeys(images.grids)}
        tokens = tokens + torch.cat([positions[grid][1][0] for grid in images.grids])
        prefix_positions = positions[images.grids[0]][0]
    prefix = tokens[:0]
    if encoder.vit.num_prefix_tokens:
        prefix = encoder.prefix(1, prefix_positions)[0]
    return tokens, prefix
