"""The blocks of PVT and what lies between its stages."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from pretrain.encoders import drop_path


class ReducedAttention(nn.Module):
    """Attention to keys and values from a coarser map.

    `sr`: side of that map's cells in tokens, brought there by a convolution with kernel = stride = sr (none at 1), or
    `pooled`: by averaging and a 1x1 convolution, which fits any sr.
    """

    def __init__(self, dim: int, heads: int, sr: int, pooled: bool) -> None:
        super().__init__()
        self.heads, self.sr_ratio, self.pooled = heads, sr, pooled
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if pooled or sr > 1:
            side = 1 if pooled else sr
            self.sr = nn.Conv2d(dim, dim, side, stride=side)
            self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int], sr: int) -> Tensor:
        """tokens (b, n, d), of which the last h * w form the map `grid`; `sr`: the cells' side, if pooled."""
        query = rearrange(self.q(tokens), "b n (h d) -> b h n d", h=self.heads)
        source = tokens
        if self.pooled or self.sr_ratio > 1:
            cells = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0])
            cells = self.sr(F.avg_pool2d(cells, sr) if self.pooled else cells)
            source = self.norm(rearrange(cells, "b d h w -> b (h w) d"))
        key, value = rearrange(self.kv(source), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))


class PvtBlock(nn.Module):
    """Norm, attention, norm, MLP, each with a residual; `downsample`, where there is one, comes first."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        sr: int,
        drop_rate: float,
        pooled: bool,
        eps: float,
        downsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = ReducedAttention(dim, heads, sr, pooled)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()
        self.downsample = downsample

    def forward(self, tokens: Tensor, grid: tuple[int, int], sr: int, paths: drop_path.Paths | None = None) -> Tensor:
        """tokens (b, n, d); with a `downsample`, `grid` is that of its output."""
        if self.downsample is not None:
            tokens = self.downsample(tokens, (2 * grid[0], 2 * grid[1]))
        attention, mlp = paths or (None, None)
        tokens = drop_path.add_branch(
            tokens, lambda part, _: self.attn(self.norm1(part), grid, sr), self.drop_path, attention
        )
        return drop_path.add_branch(tokens, lambda part, _: self.mlp(self.norm2(part)), self.drop_path, mlp)


class PatchProjection(nn.Module):
    """A convolution with kernel = stride, and a norm unless told otherwise."""

    def __init__(self, channels: int, dim: int, patch: int, norm: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h / patch, w / patch, d)."""
        return self.norm(rearrange(self.proj(images), "b d h w -> b h w d"))


class PatchMerge(nn.Module):
    """2x2 tokens to one, by a convolution with kernel = stride = 2."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 2, stride=2)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, h * w, d) of the map `grid` -> (b, h * w / 4, d)."""
        merged = self.proj(rearrange(tokens, "b (h w) d -> b d h w", h=grid[0]))
        return rearrange(merged, "b d h w -> b (h w) d")
