"""Swin's block with positions from a small network, and with experts for a feed-forward network where it has them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.swin.windows import AnySizeWindows, attend_in_windows
from pretrain.encoders.swin_moe.config import SwinMoeConfig
from pretrain.encoders.swin_moe.experts import MoeMlp, Routed
from pretrain.encoders.tables import built_once

_POSITION_WIDTH = 512


class WindowAttention(nn.Module):
    """Scaled dot products within windows, as Swin's, with a bias that a network makes of log-spaced offsets, as Swin
    v2's but without its sigmoid."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, _POSITION_WIDTH), nn.ReLU(inplace=True), nn.Linear(_POSITION_WIDTH, heads, bias=False)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (b * m, n, d) of the m windows of b images; mask (m, n, n) or None, which all images share."""
        table = self.cpb_mlp(offsets(self.window, x.device))
        bias = rearrange(table[pairs(self.window, x.device)], "i j h -> 1 h i j")
        return self.proj(attend_in_windows(self.qkv(x), self.heads, bias, mask))


@built_once
def offsets(window: int, device: torch.device) -> Tensor:
    """((2 w - 1)^2, 2) fp32: offsets of two tokens of a window, sign(8 x) log2(|8 x| + 1) / 3 of x in -1 .. 1."""
    along = torch.arange(1 - window, window, device=device, dtype=torch.float32) / max(window - 1, 1) * 8
    along = along.sign() * (along.abs() + 1).log2() / math.log2(8)
    return rearrange(torch.stack(torch.meshgrid(along, along, indexing="ij")), "two h w -> (h w) two")


@built_once
def pairs(window: int, device: torch.device) -> Tensor:
    """(w^2, w^2) int64: the row of `offsets` for each query and key."""
    along = torch.arange(window, device=device)
    rows, columns = along.repeat_interleave(window), along.repeat(window)
    apart = [axis[:, None] - axis[None] + window - 1 for axis in (rows, columns)]
    return apart[0] * (2 * window - 1) + apart[1]


class Mlp(nn.Module):
    """fc1, GELU, fc2."""

    def __init__(self, dim: int, config: SwinMoeConfig) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim, bias=config.fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(AnySizeWindows, nn.Module):
    """Attention within windows, shifted in every second block, then a feed-forward network."""

    def __init__(self, dim: int, heads: int, window: int, shifted: bool, rate: float, config: SwinMoeConfig) -> None:
        super().__init__()
        self.window_size = (window, window)
        self.target_shift_size = (window // 2, window // 2) if shifted else (0, 0)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.mlp = self.make_mlp(dim, config)
        self.drop_path1, self.drop_path2 = DropPath(rate), DropPath(rate)

    def make_mlp(self, dim: int, config: SwinMoeConfig) -> nn.Module:
        return Mlp(dim, config)

    def forward(self, x: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        """x (b, h, w, d)."""
        attention, mlp = paths or (None, None)
        x = self.attend(x, attention)
        return drop_path.add_branch(x, lambda part, _: self.mlp(self.norm2(part)), self.drop_path2, mlp)

    def attend(self, x: Tensor, path: drop_path.Branch | None) -> Tensor:
        return drop_path.add_branch(x, lambda part, _: self._attn(self.norm1(part)), self.drop_path1, path)


class MoeBlock(Block):
    """A block with experts.

    All images are routed, also those that drop this branch, whose outcome is then multiplied by zero: else what is
    dropped of one image would decide on places of another.
    """

    def __init__(
        self, dim: int, heads: int, window: int, shifted: bool, rate: float, config: SwinMoeConfig, number: int
    ) -> None:
        self.number = number
        super().__init__(dim, heads, window, shifted, rate, config)

    def make_mlp(self, dim: int, config: SwinMoeConfig) -> nn.Module:
        return MoeMlp(dim, config, self.number)

    def forward(
        self, x: Tensor, paths: drop_path.Paths | None = None, group: int = 1, keys: Tensor | None = None
    ) -> Routed:
        """x (b, h, w, d), its groups and the keys of its noise as in `MoeMlp`."""
        attention, path = paths or (None, None)
        x = self.attend(x, attention)
        routed = self.mlp(self.norm2(x), group, keys)
        if path is None:
            return routed._replace(tokens=x + self.drop_path2(routed.tokens))
        weights = path.weights
        if path.rows is not None:
            weights = weights.new_zeros(len(x)).scatter(0, path.rows, weights)
        added = (routed.tokens * rearrange(weights, "b -> b 1 1 1")).to(x.dtype)
        return routed._replace(tokens=x + added)
