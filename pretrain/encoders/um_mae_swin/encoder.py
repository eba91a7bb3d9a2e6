"""UM-MAE's Swin (Li et al. 2022): windows whose positions come from a small network over the tokens' coordinates.

On the compact map of the visible units each token keeps the coordinates it has in the image, so that neighbours in the
compact map are as far apart as they are in truth. Its weights have the names of the authors' code.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.pvt.blocks import PatchProjection
from pretrain.encoders.pyramid import Pyramid
from pretrain.encoders.swin.windows import attend_in_windows, window_mask
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig


class UmMaeSwinEncoder(Pyramid):
    """UM-MAE's Swin behind the Encoder seam; `self.swin` has the names of the authors' weights.

    Windows are `config.window` tokens wide on compact maps and twice that on whole images, as the authors do it. The
    token of replaced units passes the patch embedding's norm.
    """

    def __init__(
        self, config: UmMaeSwinConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dim, depths, _ = config.shape
        self.patch, self.stride, self.window = config.patch, config.stride, config.window
        self.depths, self.depth, self.dim = depths, sum(depths), dim * 2 ** (len(depths) - 1)
        self.swin = UmMaeSwin(config, channels)
        self.make_mask_token(dim, mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.swin.patch_embed(images)

    def replacement(self) -> Tensor:
        assert self.mask_token is not None
        return self.swin.patch_embed.norm(self.mask_token)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        height, width = tokens.shape[1], tokens.shape[2]
        whole = (height, width) if compact is None else (2 * height, 2 * width)
        axes = [torch.arange(side, device=tokens.device, dtype=torch.float32) for side in whole]
        positions = rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "two h w -> 1 h w two")
        if compact is not None:
            positions = compact.move(positions)
        paths = drop_path.paths_of(self.swin.blocks, tokens.shape[0], tokens.device)
        kept = {}
        for index, block in enumerate(self.swin.blocks):
            if block.downsample is not None:
                positions = positions[:, ::2, ::2] / 2
            window = self.window if compact is not None else 2 * self.window
            tokens = block(tokens, positions, window, paths[index])
            if index in wanted:
                kept[index] = tokens
        return tokens, kept

    def inner(self) -> nn.Module:
        return self.swin

    def final_norm(self, states: Tensor) -> Tensor:
        return self.swin.norm(states)

    def blocks(self) -> list[nn.Module]:
        return list(self.swin.blocks)

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return 0 if "patch_embed" in parts or "norm" not in parts else self.depth + 1


class UmMaeSwin(nn.Module):
    """The modules: patch_embed, blocks.N with .downsample at the start of a stage, norm."""

    def __init__(self, config: UmMaeSwinConfig, channels: int) -> None:
        super().__init__()
        dim, depths, heads = config.shape
        rates = iter(np.linspace(0, config.drop_path, sum(depths)).tolist())
        self.patch_embed = PatchProjection(channels, dim, config.patch)
        self.patch_embed.norm.eps = 1e-6
        blocks = []
        for stage, depth in enumerate(depths):
            for position in range(depth):
                downsample = NormMerge(dim * 2 ** (stage - 1)) if stage and position == 0 else None
                shifted = position % 2 == 1
                blocks.append(
                    CoordinateBlock(dim * 2**stage, heads[stage], config.position_dim, shifted, next(rates), downsample)
                )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim * 2 ** (len(depths) - 1), eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(
                    module.weight, std=math.sqrt(2.0 / (math.prod(module.kernel_size) * module.out_channels))
                )
                nn.init.zeros_(module.bias)


class NormMerge(nn.Module):
    """Norm, then 2x2 tokens to one of twice the width by a convolution with kernel = stride = 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Conv2d(dim, 2 * dim, 2, stride=2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h / 2, w / 2, 2 d)."""
        merged = self.proj(rearrange(self.norm(tokens), "b h w d -> b d h w"))
        return rearrange(merged, "b d h w -> b h w d")


class CoordinateBlock(nn.Module):
    """A Swin block whose windows know the coordinates of their tokens."""

    def __init__(
        self, dim: int, heads: int, position_dim: int, shifted: bool, drop_rate: float, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CoordinateAttention(dim, heads, position_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()
        self.downsample = downsample

    def forward(self, tokens: Tensor, positions: Tensor, window: int, paths: drop_path.Paths | None = None) -> Tensor:
        """tokens (b, h, w, d); positions (1 or b, h, w, 2), after the block's `downsample` where it has one."""
        if self.downsample is not None:
            tokens = self.downsample(tokens)

        def attend(part: Tensor, rows: Tensor | None) -> Tensor:
            own = positions if rows is None or len(positions) == 1 else positions.index_select(0, rows)
            return self._attend(self.norm1(part), own, window)

        attention, mlp = paths or (None, None)
        tokens = drop_path.add_branch(tokens, attend, self.drop_path, attention)
        return drop_path.add_branch(tokens, lambda part, _: self.mlp(self.norm2(part)), self.drop_path, mlp)

    def _attend(self, tokens: Tensor, positions: Tensor, window: int) -> Tensor:
        height, width = tokens.shape[1], tokens.shape[2]
        whole = min(height, width) <= window  # a map no larger than a window is one, and is not shifted
        side = min(height, width) if whole else window
        shift = 0 if whole or not self.shifted else window // 2
        pad = (-width % side, -height % side)

        def windows(cells: Tensor) -> Tensor:
            if shift:
                cells = torch.roll(cells, shifts=(-shift, -shift), dims=(1, 2))
            cells = F.pad(cells, (0, 0, 0, pad[0], 0, pad[1]))
            return rearrange(window_partition(cells, (side, side)), "n h w d -> n (h w) d")

        padded = (height + pad[1], width + pad[0])
        mask = None
        if shift or any(pad):
            mask = window_mask((height, width), padded, (side, side), (shift, shift), tokens.device)
        places = windows(positions)
        if mask is None and len(positions) == 1:  # all windows are whole, and hold the same offsets
            places = places[:1]
        mixed = self.attn(windows(tokens), places, mask)
        mixed = rearrange(mixed, "n (h w) d -> n h w d", h=side)
        mixed = window_reverse(mixed, (side, side), *padded)[:, :height, :width]
        return torch.roll(mixed, shifts=(shift, shift), dims=(1, 2)) if shift else mixed


class CoordinateAttention(nn.Module):
    """Attention within windows; its bias is a network's word on the log-spaced offset of two tokens."""

    def __init__(self, dim: int, heads: int, position_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.posmlp = nn.Sequential(nn.Conv2d(2, position_dim, 1), nn.ReLU(), nn.Conv2d(position_dim, heads, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """tokens (b * m, n, d) of m windows an image; positions (1, m or b * m, n, 2); mask (m, n, n) or None."""
        coordinates = rearrange(positions, "w n two -> w two n")
        offsets = rearrange(coordinates, "w two j -> w two 1 j") - rearrange(coordinates, "w two i -> w two i 1")
        bias = self.posmlp(offsets.sign() * offsets.abs().log1p())
        if mask is not None and len(bias) > len(mask):
            mask = repeat(mask, "m i j -> (b m) i j", b=len(bias) // len(mask))
        return self.proj(attend_in_windows(self.qkv(tokens), self.heads, bias, mask))
