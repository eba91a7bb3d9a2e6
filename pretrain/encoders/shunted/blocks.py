"""The blocks of the Shunted Transformer (Ren et al. 2022, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.convolutions import Depthwise

EPS = 1e-6  # of the blocks' norms and those that end stages; all others have torch's 1e-5


class ShuntedAttention(nn.Module):
    """Half of the heads attend to cells of sr x sr tokens, half to cells of half that side; at sr 1 all to all tokens.

    Values get a 3x3 convolution of themselves on top: before they are attended to, or at sr 1 at their own places.
    """

    def __init__(self, dim: int, heads: int, sr: int) -> None:
        super().__init__()
        self.heads, self.sr = heads, sr
        self.q = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        if sr == 1:
            self.kv = nn.Linear(dim, 2 * dim)
            self.local_conv = Depthwise(dim, 3)
        for half in self._halves():
            side = self._side(half)
            setattr(self, f"sr{half}", nn.Conv2d(dim, dim, side, stride=side))
            setattr(self, f"norm{half}", nn.LayerNorm(dim))
            setattr(self, f"kv{half}", nn.Linear(dim, dim))
            setattr(self, f"local_conv{half}", Depthwise(dim // 2, 3))

    def _halves(self) -> tuple[int, ...]:
        return (1, 2) if self.sr > 1 else ()

    def _side(self, half: int) -> int:
        """Of a cell in tokens."""
        return self.sr // half

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, h, w, d); a map that cells don't fill is filled up with zeros."""
        size = (tokens.shape[1], tokens.shape[2])
        query = rearrange(self.q(tokens), "b h w (n d) -> b n (h w) d", n=self.heads)
        if self.sr == 1:
            key, value = self.kv(tokens).chunk(2, dim=-1)
            mixed = F.scaled_dot_product_attention(query, self._heads(key, self.heads), self._heads(value, self.heads))
            return self.proj(_as_map(mixed, size) + self.local_conv(value))
        mixed = [
            F.scaled_dot_product_attention(part, *self._coarse(tokens, half))
            for half, part in zip(self._halves(), query.chunk(2, dim=1), strict=True)
        ]
        return self.proj(_as_map(torch.cat(mixed, dim=1), size))

    def _coarse(self, tokens: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """Keys and values (b, heads / 2, cells, d) of one half of the heads."""
        height, width = tokens.shape[1], tokens.shape[2]
        filled = F.pad(tokens, (0, 0, 0, -width % self._side(half), 0, -height % self._side(half)))
        cells = getattr(self, f"sr{half}")(rearrange(filled, "b h w d -> b d h w"))
        cells = F.gelu(getattr(self, f"norm{half}")(rearrange(cells, "b d h w -> b h w d")))
        key, value = getattr(self, f"kv{half}")(cells).chunk(2, dim=-1)
        value = value + getattr(self, f"local_conv{half}")(value)
        return self._heads(key, self.heads // 2), self._heads(value, self.heads // 2)

    def _heads(self, cells: Tensor, heads: int) -> Tensor:
        return rearrange(cells, "b h w (n d) -> b n (h w) d", n=heads)


class DetailMlp(nn.Module):
    """The detail-specific feed-forward layer: between its two linear layers a token sees its eight neighbours."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": Depthwise(hidden, 3)})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, h, w, d)."""
        hidden = self.fc1(tokens)
        return self.fc2(F.gelu(hidden + self.dwconv["dwconv"](hidden)))


class ShuntedBlock(nn.Module):
    """Norm, attention, norm, MLP, each with a residual."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, sr: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = ShuntedAttention(dim, heads, sr)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = DetailMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()

    def forward(self, tokens: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        """tokens (b, h, w, d)."""
        attention, mlp = paths or (None, None)
        tokens = drop_path.add_branch(tokens, lambda part, _: self.attn(self.norm1(part)), self.drop_path, attention)
        return drop_path.add_branch(tokens, lambda part, _: self.mlp(self.norm2(part)), self.drop_path, mlp)


class Stem(nn.Module):
    """Tokens of 4x4 px: 7x7 / 2, `further` times 3x3, 2x2 / 2; all but the last with BatchNorm and ReLU."""

    def __init__(self, channels: int, dim: int, further: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(1 + further):
            first = number == 0
            layers += [
                nn.Conv2d(channels, dim, 7, stride=2, padding=3, bias=False)
                if first
                else nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                nn.BatchNorm2d(dim),
                nn.ReLU(),
            ]
        self.conv = nn.Sequential(*layers, nn.Conv2d(dim, dim, 2, stride=2))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h / 4, w / 4, d)."""
        return self.norm(rearrange(self.conv(images), "b d h w -> b h w d"))


class OverlappingMerge(nn.Module):
    """3x3 tokens to one at every second place, and a norm: (b, h, w, d) -> (b, h / 2, w / 2, out)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(rearrange(tokens, "b h w d -> b d h w")), "b d h w -> b h w d"))


def _as_map(mixed: Tensor, size: tuple[int, int]) -> Tensor:
    return rearrange(mixed, "b n (h w) d -> b h w (n d)", h=size[0])
