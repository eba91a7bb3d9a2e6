"""What an encoder looks at, for the eye: the class token's attention, or the main directions of its patch tokens.

Nothing is hung on the encoder: the attention is read where torch computes it, within an ordinary forward pass. So the
same works for any encoder, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pretrain.encoders.base import Encoder, Features

#: Heads that are shown beside their mean: more would make each too small to see.
MOST_HEADS = 6


class _LastAttention(TorchFunctionMode):
    """Remembers the arguments of the last `scaled_dot_product_attention` in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            self.seen = dict(zip(names, args, strict=False)) | kwargs
        return func(*args, **kwargs)


@torch.no_grad()
def class_token_attention(encoder: Encoder, images: Tensor) -> tuple[Features, Tensor | None]:
    """An encoder's features of `images` (b, c, h, w), and how its last block's class token attends to all tokens.

    The attention is (b, heads, p + n), over p prefix tokens and n patches, and sums to 1. None for an encoder without
    a class token, and for one whose last attention is not between all tokens of an image.
    """
    with torch.compiler.set_stance("force_eager"), _LastAttention() as last:  # compiled blocks would not be seen into
        features = encoder(images)
    seen = last.seen
    if seen is None or not encoder.has_class_token or features.prefix_tokens is None or features.grid is None:
        return features, None
    query, key, mask = seen["query"].float(), seen["key"].float(), seen.get("attn_mask")
    num_tokens = features.prefix_tokens.shape[1] + features.tokens.shape[1]
    if query.ndim != 4 or len(query) != len(images) or query.shape[2] != num_tokens or key.shape[2] != num_tokens:
        return features, None
    scale = seen.get("scale") or query.shape[-1] ** -0.5
    weights = query[:, :, :1] @ key.transpose(-2, -1) * scale
    if mask is not None:
        row = mask[..., :1, :]
        weights = weights.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else weights + row.float()
    return features, rearrange(weights.softmax(dim=-1), "b heads 1 n -> b heads n")


@torch.no_grad()
def attention_pictures(
    encoder: Encoder, images: Tensor, crops: Tensor, show: Callable[[Tensor], Tensor], of: str = "encoder"
) -> dict[str, Tensor]:
    """A named picture of what an encoder makes of `images`, which are `crops` (b, c, h, w), normalised.

    The attention of the class token (mean of the heads, then some of them), each over the greyed image;
    without one, the patch tokens along the three directions in which they vary most, as red, green and blue. Nothing
    where neither can be drawn. `show` makes uint8 pictures of crops; `of` names the encoder.
    """
    features, attention = class_token_attention(encoder, images)
    shown = show(crops)
    if attention is not None and features.prefix_tokens is not None and features.grid is not None:
        patches = attention[..., features.prefix_tokens.shape[1] :]
        maps = torch.cat([reduce(patches, "b heads n -> b 1 n", "mean"), patches[:, :MOST_HEADS]], dim=1)
        maps = maps / maps.amax(dim=-1, keepdim=True).clamp_min(1e-12)
        maps = _enlarged(rearrange(maps, "b k (h w) -> b k h w", h=features.grid[0]), crops)
        maps = _over(shown, maps)
        columns = "image, mean of the heads, then a head each, over the greyed image; last block"
        label = f"attention of the {of}'s class token ({columns})"
        return {label: torch.cat([shown, maps], dim=-1)}
    few = features.grid is None or min(features.tokens[..., 0].numel(), features.tokens.shape[-1]) < 3
    if shown.shape[1] != 3 or few or not features.tokens.isfinite().all():
        return {}  # no map, fewer than three directions, or a run that is about to stop with words of its own
    grid = features.grid
    assert grid is not None
    light = rearrange(F.adaptive_avg_pool2d(images.float().mean(dim=1), grid), "b h w -> b (h w)")
    maps = rearrange(main_directions(features.tokens, light), "b (h w) c -> b c h w", h=grid[0])
    label = f"tokens of the {of} (image, then their three main directions as red, green, blue)"
    return {label: torch.cat([shown, _enlarged(maps, crops)], dim=-1)}


def main_directions(tokens: Tensor, along_with: Tensor | None = None) -> Tensor:
    """Tokens (b, n, d) along the three directions in which those of all images vary most: (b, n, 3) in 0 .. 1.

    A direction has no sign of its own. With `along_with` (b, n) each points where that rises, so that pictures of
    different steps can be compared.
    """
    flat = rearrange(tokens.float(), "b n d -> (b n) d")
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    along = flat @ directions[:3].T
    if along_with is not None:
        guide = rearrange(along_with.float(), "b n -> (b n)")
        along = torch.where(along.T @ (guide - guide.mean()) < 0, -along, along)
    low, high = along.amin(dim=0), along.amax(dim=0)
    return rearrange((along - low) / (high - low).clamp_min(1e-12), "(b n) c -> b n c", b=len(tokens))


def _over(shown: Tensor, maps: Tensor) -> Tensor:
    """Heat maps (b, k, h, w) uint8 over the greyed picture (b, 3, h, w), beside each other: (b, 3, h, k w) uint8. The
    hotter a patch, the more of its colour, from dark red over yellow to white. Of pictures that are not RGB the maps
    stand alone, in grey."""
    flat = rearrange(maps, "b k h w -> b 1 h (k w)")
    if shown.shape[1] != 3:
        return flat.expand(-1, shown.shape[1], -1, -1)
    heat = flat.float() / 255
    colour = torch.cat([(3 * heat - start).clamp(0, 1) for start in range(3)], dim=1)
    grey = repeat(shown.float().mean(dim=1) / 255, "b h w -> b 1 h (k w)", k=maps.shape[1])
    return ((0.6 * grey * (1 - heat) + colour * heat) * 255).round().to(torch.uint8)


def _enlarged(maps: Tensor, crops: Tensor) -> Tensor:
    """Maps (b, c, gh, gw) in 0 .. 1 as uint8 of the crops' height and width."""
    return (F.interpolate(maps, size=crops.shape[-2:], mode="nearest") * 255).to(torch.uint8)
