"""NaViT's block and its pooling, on tokens of many images one behind the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.packed import Groups, PackedPaths, attend_packed, in_groups


def norm(dim: int) -> nn.LayerNorm:
    """Layer norm without a bias."""
    return nn.LayerNorm(dim, eps=1e-5, bias=False)


class HeadNorm(nn.Module):
    """Each head's vector brought to a root mean square of 1, then times a learned gain: (..., h, d) to the same."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * (x.shape[-1] ** 0.5 * self.gain).to(x.dtype)


class Attention(nn.Module):
    """Attention within each image, without biases, of normalised queries and keys, whose product is not scaled."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = HeadNorm(heads, dim // heads), HeadNorm(heads, dim // heads)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Tokens (t, d) of images in `groups` to (t, d)."""
        query, key, value = rearrange(self.qkv(x), "t (three h d) -> three t h d", three=3, h=self.heads)
        query = self.q_norm(query) * query.shape[-1] ** 0.5  # what attention divides by
        parts = [rearrange(part, "t h d -> t (h d)") for part in (query, self.k_norm(key), value)]
        return self.proj(attend_packed(torch.cat(parts, dim=-1), self.heads, groups))


class Mlp(nn.Sequential):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)


class NavitBlock(nn.Module):
    """Attention, then the MLP, each on what a norm makes of the tokens and added to them."""

    def __init__(self, dim: int, heads: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = norm(dim), Attention(dim, heads), DropPath(drop)
        self.norm2, self.mlp, self.drop_path2 = norm(dim), Mlp(dim, hidden), DropPath(drop)

    def forward(self, x: Tensor, paths: PackedPaths) -> Tensor:
        """Tokens (t, d) to (t, d)."""
        (attention, left), (mlp, _) = paths

        def attend(part: Tensor, _: Tensor | None) -> Tensor:
            return self.attn(self.norm1(part), left)

        x = drop_path.add_branch(x, attend, self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.mlp(self.norm2(part)), self.drop_path2, mlp)


class AttentionPool(nn.Module):
    """What one learned query finds in each image, beside the query itself: (t, d) to (n, d)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm = norm(dim)
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.q_norm, self.k_norm = HeadNorm(heads, dim // heads), HeadNorm(heads, dim // heads)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        query = self.q_norm(rearrange(self.q(self.norm(self.query)), "(h d) -> h d", h=self.heads))
        key, value = rearrange(self.kv(tokens), "t (two h d) -> two t h d", two=2, h=self.heads)
        both = torch.cat([rearrange(part, "t h d -> t (h d)") for part in (self.k_norm(key), value)], dim=-1)

        def attend(part: Tensor) -> Tensor:
            k, v = rearrange(part, "b n (two h d) -> two b h n d", two=2, h=self.heads)
            asked = repeat(query.to(k.dtype), "h d -> b h 1 d", b=len(k))
            return rearrange(F.scaled_dot_product_attention(asked, k, v, scale=1.0), "b h 1 d -> b (h d)")

        found = torch.cat([attend(part) for part in in_groups(both, groups)])
        return self.query + self.proj(found)
