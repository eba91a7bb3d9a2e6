"""From pixels to tokens in three steps (Yuan et al. 2021, section 3.1), in each of which windows of cells that overlap
become one token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

#: Side, stride and padding of the windows of the three steps, in cells.
STEPS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
_NORMALISER_EPS = 1e-8


class TokensToToken(nn.Module):
    """The modules: attention1, attention2 between the steps, project."""

    def __init__(self, kind: str, channels: int, token_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        layers = [
            PerformerLayer(width, token_dim, dropout) if kind == "performer" else TransformerLayer(width, token_dim)
            for width in (channels * STEPS[0][0] ** 2, token_dim * STEPS[1][0] ** 2)
        ]
        self.attention1, self.attention2 = layers
        self.project = nn.Linear(token_dim * STEPS[2][0] ** 2, dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w), whose sides are multiples of 16 px, to tokens (b, h / 16, w / 16, d)."""
        cells = images
        for layer, (side, stride, padding) in zip((self.attention1, self.attention2), STEPS, strict=False):
            grid = cells.shape[2] // stride
            windows = rearrange(F.unfold(cells, side, stride=stride, padding=padding), "b d n -> b n d")
            cells = rearrange(layer(windows), "b (h w) d -> b d h w", h=grid)
        side, stride, padding = STEPS[2]
        kernel = rearrange(self.project.weight, "d (c p q) -> d c p q", p=side, q=side)
        tokens = F.conv2d(cells, kernel, self.project.bias, stride, padding)  # windows and layer at once
        return rearrange(tokens, "b d h w -> b h w d")


class PerformerLayer(nn.Module):
    """Attention of one head whose softmax is taken for the product of random features (Choromanski et al. 2021), then
    an MLP. The values, not the input, are what the attention is added to, for they are narrower.

    w: (m, d) the random directions, orthogonal rows of length sqrt(m), never trained.
    """

    def __init__(self, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.kqv = nn.Linear(width, 3 * dim)  # in this order
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(dropout))
        features = dim // 2
        self.w = nn.Parameter(nn.init.orthogonal_(torch.empty(features, dim)) * features**0.5, requires_grad=False)

    def features(self, x: Tensor) -> Tensor:
        """exp(w x - |x|^2 / 2) / sqrt(m) of x (b, n, d): (b, n, m), positive, whose products estimate exp(x y)."""
        exponent = x @ rearrange(self.w, "m d -> d m") - x.square().sum(dim=-1, keepdim=True) / 2
        return exponent.exp() / self.w.shape[0] ** 0.5

    def forward(self, windows: Tensor) -> Tensor:
        """(b, n, width) to (b, n, d), in time that grows with n."""
        key, query, value = self.kqv(self.norm1(windows)).chunk(3, dim=-1)
        key, query = self.features(key), self.features(query)
        summed = rearrange(key, "b n m -> b m n") @ value
        total = query @ rearrange(key.sum(dim=1), "b m -> b m 1")
        attended = query @ summed / (total + _NORMALISER_EPS)
        states = value + self.dropout(self.proj(attended))
        return states + self.mlp(self.norm2(states))


class TransformerLayer(nn.Module):
    """Full attention of one head, then an MLP; what it is added to are the values."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WideAttention(width, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, windows: Tensor) -> Tensor:
        """(b, n, width) to (b, n, d)."""
        states = self.attn(self.norm1(windows))
        return states + self.mlp(self.norm2(states))


class WideAttention(nn.Module):
    """Attention of one head, scaled by the width of its input^-.5 as in the authors' code, and the values added."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.scale = width**-0.5

    def forward(self, windows: Tensor) -> Tensor:
        """(b, n, width) to (b, n, d)."""
        query, key, value = rearrange(self.qkv(windows), "b n (three d) -> three b 1 n d", three=3)
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return rearrange(value + self.proj(attended), "b 1 n d -> b n d")
