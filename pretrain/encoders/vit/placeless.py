"""Tokens without positions, of which only some are attended to (MP3: Zhai et al. 2022, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange, repeat
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.attention import attend
from pretrain.encoders.base import Features, Mask, refine

if TYPE_CHECKING:
    from pretrain.encoders.vit.encoder import VitEncoder


class Context(NamedTuple):
    """What attention's keys and values are made of.

    ids: (b, m) of the tokens that are attended to. embedded: (b, m, d) these tokens as they were embedded, where every
    block attends to those; None: to what the blocks before have made of them.
    """

    ids: Tensor
    embedded: Tensor | None

    def attend(self, attention: Attention, norm: nn.Module, normed: Tensor, rows: Tensor | None) -> Tensor:
        """(b, n, d) what all tokens, after the block's `norm`, find in the context; before the projection.

        rows: which of the batch's rows `normed` holds, where paths are dropped.
        """
        ids, embedded = (
            part if part is None or rows is None else part.index_select(0, rows) for part in (self.ids, self.embedded)
        )
        query, key, value = _by_head(attention, normed)
        if embedded is None:
            assert ids is not None
            where = repeat(ids, "b m -> b h m d", h=key.shape[1], d=key.shape[3])
            key, value = key.gather(2, where), value.gather(2, where)
        else:
            _, key, value = _by_head(attention, norm(embedded))
        return rearrange(attend(query, key, value), "b h n d -> b n (h d)")


def _by_head(attention: Attention, normed: Tensor) -> Tensor:
    return rearrange(attention.qkv(normed), "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)


def encode(encoder: VitEncoder, images: Tensor, mask: Mask, layers: tuple[int, ...]) -> Features:
    """Features of all tokens of (b, c, h, w) images, of which none attends to those that `mask` calls unseen."""
    assert mask.unseen is not None
    vit, grid = encoder.vit, (images.shape[2] // encoder.patch, images.shape[3] // encoder.patch)
    tokens = rearrange(vit.patch_embed(images), "b h w d -> b (h w) d")
    prefix_positions = None
    if vit.pos_embed is not None:
        prefix_positions, positions = encoder.positions(grid)
        if mask.placeless is not None:
            placeless = rearrange(refine(mask.placeless, grid), "b h w -> b (h w) 1")
            positions = positions.masked_fill(placeless, 0.0)
        tokens = tokens + positions
    if vit.num_prefix_tokens:
        tokens = torch.cat([encoder.prefix(len(images), prefix_positions), tokens], dim=1)
    tokens = vit.norm_pre(tokens)
    num_seen = mask.num_visible
    if num_seen is not None:
        num_seen = num_seen * grid[0] * grid[1] // mask.unseen[0].numel()
    seen = Mask(refine(mask.unseen, grid), num_visible=num_seen).visible_ids()
    count = vit.num_prefix_tokens  # class and register tokens are always attended to
    prefix = repeat(torch.arange(count, device=seen.device), "p -> b p", b=len(seen))
    ids = torch.cat([prefix, seen + count], dim=1)
    embedded = tokens.gather(1, repeat(ids, "b m -> b m d", d=encoder.dim)) if mask.keys == "embedded" else None
    context, kept = Context(ids, embedded), {}
    wanted = {index % encoder.depth for index in layers}
    paths = drop_path.paths_of(vit.blocks, len(images), images.device)
    for index, (block, path) in enumerate(zip(vit.blocks, paths, strict=True)):
        tokens = block(tokens, path, None, context)
        if index in wanted:
            kept[index] = tokens
    earlier = tuple(encoder.features_of(kept[index % encoder.depth], grid, None) for index in layers)
    return encoder.features_of(tokens, grid, None)._replace(layers=earlier)
