"""The blocks of Swin over timm's, of both versions: windows on maps of any size, fused attention within them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention, window_partition, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor

from pretrain.encoders import drop_path
from pretrain.encoders.attention import attend
from pretrain.encoders.tables import built_once


def teach(block: SwinTransformerBlock | SwinTransformerV2Block) -> None:
    """Make a block that timm built one of ours: they differ in methods, not in state."""
    first = isinstance(block, SwinTransformerBlock)
    block.__class__ = AnySizeBlock if first else AnySizeBlockV2
    block.attn.__class__ = FusedWindows if first else FusedWindowsV2


class AnySizeWindows:
    """The windows of timm's Swin blocks (`_attn` of both versions), right for maps of any size.

    Tokens added to fill the last windows are masked out (timm attends to them), and a map no larger than its window
    is not shifted, so local crops and compact maps see what a model built for their size would see.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        window = self.window_size
        # not `shift_size`, which timm sets to 0 where the map of the size it is built for is one window
        shift = tuple(
            0 if side <= w else min(s, w // 2)
            for side, w, s in zip((height, width), window, self.target_shift_size, strict=True)
        )
        pad = (-width % window[1], -height % window[0])
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        x = F.pad(x, (0, 0, 0, pad[0], 0, pad[1]))
        padded = (x.shape[1], x.shape[2])
        mask = None
        if any(shift) or any(pad):
            mask = window_mask((height, width), padded, window, shift, x.device)
        windows = rearrange(window_partition(x, window), "n h w d -> n (h w) d")
        windows = rearrange(self.attn(windows, mask=mask), "n (h w) d -> n h w d", h=window[0])
        x = window_reverse(windows, window, *padded)[:, :height, :width]
        if any(shift):
            x = torch.roll(x, shifts=shift, dims=(1, 2))
        return x


class AnySizeBlock(AnySizeWindows, SwinTransformerBlock):
    """timm's block of version 1, which computes the paths that are kept."""

    def forward(self, x: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        """x (b, h, w, d)."""
        attention, mlp = paths or (None, None)
        x = drop_path.add_branch(x, lambda part, _: self._attn(self.norm1(part)), self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.mlp(self.norm2(part)), self.drop_path2, mlp)


class AnySizeBlockV2(AnySizeWindows, SwinTransformerV2Block):
    """timm's block of version 2 likewise."""

    def forward(self, x: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        """x (b, h, w, d)."""
        attention, mlp = paths or (None, None)
        x = drop_path.add_branch(x, lambda part, _: self.norm1(self._attn(part)), self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.norm2(self.mlp(part)), self.drop_path2, mlp)


class FusedWindows(WindowAttention):
    """timm's attention within windows, in one call."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (b * m, n, d) of the m windows of b images; mask (m, n, n) or None, which all images share."""
        bias = rearrange(self.relative_position_bias_table[self.relative_position_index], "i j h -> 1 h i j")
        return self.proj(attend_in_windows(self.qkv(x), self.num_heads, bias, mask))


class FusedWindowsV2(WindowAttentionV2):
    """timm's cosine attention within windows, in one call."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `FusedWindows`."""
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        table = 16 * self.cpb_mlp(self.relative_coords_table).sigmoid()  # (1, 2h - 1, 2w - 1, heads)
        table = rearrange(table, "1 rows columns h -> (rows columns) h")
        bias = rearrange(table[self.relative_position_index], "i j h -> 1 h i j")
        logit_scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return self.proj(attend_in_windows(qkv, self.num_heads, bias, mask, logit_scale))


def attend_in_windows(
    qkv: Tensor, heads: int, bias: Tensor, mask: Tensor | None, logit_scale: Tensor | None = None
) -> Tensor:
    """Attention within each of the m windows of b images.

    Args:
        qkv: (b * m, n, 3 * heads * d), windows of an image one behind the other.
        bias: (1, heads, n, n), or where windows differ (m or b * m, heads, n, n).
        mask: (m, n, n), added to all heads and images, or None.
        logit_scale: (heads, 1, 1), what the cosine of query and key is multiplied by; None: their product is scaled.

    Gives (b * m, n, heads * d).
    """
    query, key, value = rearrange(qkv, "w n (three h d) -> three w h n d", three=3, h=heads)
    scale = None
    if logit_scale is not None:
        query, key, scale = F.normalize(query, dim=-1) * logit_scale, F.normalize(key, dim=-1), 1.0
        query, key = query.to(value.dtype), key.to(value.dtype)
    if mask is not None:
        bias = bias + rearrange(mask, "m i j -> m 1 i j")
    num = len(bias)
    if num == 1:
        mixed = attend(query, key, value, bias, scale)
    else:  # the windows of an image as heads of it: nothing that all images share is repeated for each
        query, key, value = (rearrange(part, "(b m) h n d -> b (m h) n d", m=num) for part in (query, key, value))
        mixed = attend(query, key, value, rearrange(bias, "m h i j -> 1 (m h) i j"), scale)
        mixed = rearrange(mixed, "b (m h) n d -> (b m) h n d", m=num)
    return rearrange(mixed, "w h n d -> w n (h d)")


@built_once
def window_mask(
    size: tuple[int, int],
    padded: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """(windows, tokens, tokens) added to the attention, fp32: -100 between tokens that are no neighbours in the image.

    A window of the shifted map may hold tokens of opposite borders, and filling tokens; each is a region of its own.
    """
    labels = []
    for side, whole, moved in zip(size, padded, shift, strict=True):
        position = torch.arange(whole, device=device)
        labels.append((position >= side - moved).long() + (position >= side).long())  # 0 in place, wrapped, filling
    regions = rearrange(labels[0], "h -> 1 h 1 1") * 3 + rearrange(labels[1], "w -> 1 1 w 1")
    flat = rearrange(window_partition(regions, window), "n h w 1 -> n (h w)")
    apart = rearrange(flat, "n i -> n i 1") != rearrange(flat, "n j -> n 1 j")
    return torch.zeros(apart.shape, device=device).masked_fill_(apart, -100.0)
