"""ConViT's gated positional attention (d'Ascoli et al. 2021) on maps of any shape, and on a part of their patches.

timm's takes the tokens for a square map; with all patches of one, this computes the same from the same weights.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from timm.models.convit import GPSA, ConVit
from torch import Tensor, nn

from pretrain.encoders.tables import built_once


class PlacedAttention(GPSA):
    """timm's GPSA that is told where its tokens are.

    grid: patches (h, w) of an image. shown: (b, k) raster indices of the patches that are its tokens; None: all.
    """

    grid: tuple[int, int]
    shown: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, n, d) to (b, n, d)."""
        values = rearrange(self.v(x), "b n (h d) -> b h n d", h=self.num_heads)
        mixed = rearrange(self.get_attention(x) @ values, "b h n d -> b n (h d)")
        return self.proj_drop(self.proj(mixed))

    def get_attention(self, x: Tensor) -> Tensor:
        """Attention (b, h, n, n): of contents and of positions, mixed by each head's gate, each row a distribution."""
        queries, keys = rearrange(self.qk(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        content = ((queries @ keys.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        places = self._places(x)
        offsets = rearrange(places, "b n c -> b 1 n c") - rearrange(places, "b n c -> b n 1 c")  # key minus query
        offsets = torch.cat([offsets, offsets.square().sum(dim=-1, keepdim=True)], dim=-1).to(x.dtype)
        position = rearrange(self.pos_proj(offsets), "b n m h -> b h n m").softmax(dim=-1)
        gate = torch.sigmoid(rearrange(self.gating_param, "h -> h 1 1"))
        mixed = (1.0 - gate) * content + gate * position
        return self.attn_drop(mixed / mixed.sum(dim=-1, keepdim=True))

    def _places(self, x: Tensor) -> Tensor:
        """(1 or b, n, 2): column and row of each token."""
        places = _raster(self.grid, x.device)
        if self.shown is None:
            return places[None]
        each = repeat(places, "n c -> b n c", b=len(self.shown))
        return each.gather(1, repeat(self.shown, "b k -> b k c", c=2))


@built_once
def _raster(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(h * w, 2) fp32: column and row of each patch in raster order."""
    sides = (torch.arange(count, dtype=torch.float32, device=device) for count in grid)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return rearrange([columns, rows], "c h w -> (h w) c")


def place(model: nn.Module) -> None:
    """Have a ConViT of timm's attend by where its patches are; other models stay as they are."""
    if isinstance(model, ConVit):
        for part in model.modules():
            if isinstance(part, GPSA):
                part.__class__ = PlacedAttention  # timm builds it; ours differs in `forward`, not in state
                part.grid, part.shown = tuple(model.patch_embed.grid_size), None
