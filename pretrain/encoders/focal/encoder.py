"""The Focal Transformer (Yang et al. 2021): windows that see near tokens one by one and far ones pooled."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.focal.attention import FocalAttention, WindowPool
from pretrain.encoders.focal.config import FocalConfig
from pretrain.encoders.pyramid import Pyramid


class FocalEncoder(Pyramid):
    """The Focal Transformer behind the Encoder seam; `self.focal` has the official weights' names.

    The authors' is built for one size of image; this one takes any.
    """

    def __init__(
        self, config: FocalConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dim, depths, _ = config.shape
        self.patch, self.stride, self.overlapping = config.patch, config.stride, config.overlapping
        self.depths, self.depth, self.dim = depths, sum(depths), dim * 2 ** (len(depths) - 1)
        self.focal = Focal(config, channels)
        self.make_mask_token(dim, mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.focal.patch_embed(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        kept: dict[int, Tensor] = {}
        index = 0
        for stage in self.focal.layers:
            for block in stage["blocks"]:
                tokens = block(tokens, paths[index])
                if index in wanted:
                    kept[index] = tokens
                index += 1
            if "downsample" in stage:
                tokens = stage["downsample"](rearrange(tokens, "b h w d -> b d h w"))
        return tokens, kept

    def final_norm(self, states: Tensor) -> Tensor:
        return self.focal.norm(states)

    def inner(self) -> nn.Module:
        return self.focal

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.focal.layers for block in stage["blocks"]]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "layers" not in parts:
            return self.depth + 1 if "norm" in parts and "patch_embed" not in parts else 0
        stage, part, number = parts[parts.index("layers") + 1 :][:3]
        before = sum(self.depths[: int(stage)])
        return before + (int(number) if part == "blocks" else self.depths[int(stage)]) + 1

    def no_decay(self, parameter_name: str) -> bool:
        return "relative_position_bias_table" in parameter_name  # those to neighbours and windows too


class Focal(nn.Module):
    """Under the official names: patch_embed, layers.N.blocks.M, layers.N.downsample, norm."""

    def __init__(self, config: FocalConfig, channels: int) -> None:
        super().__init__()
        dim, depths, _ = config.shape
        rates = iter(np.linspace(0, config.drop_path, sum(depths)).tolist())
        self.patch_embed = Projection(channels, dim, config.patch, 7 if config.overlapping else config.patch)
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(depths):
            blocks = nn.ModuleList(FocalBlock(config, stage, next(rates)) for _ in range(depth))
            self.layers.append(nn.ModuleDict({"blocks": blocks}))
            if stage < len(depths) - 1:
                width = dim * 2**stage
                merge = Projection(width, 2 * width, 2, 3 if config.overlapping else 2)
                self.layers[-1]["downsample"] = merge
        self.norm = nn.LayerNorm(dim * 2 ** (len(depths) - 1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class FocalBlock(nn.Module):
    """Norm, focal attention, norm, MLP, each with a residual, and a scale where there is one."""

    def __init__(self, config: FocalConfig, stage: int, drop_rate: float) -> None:
        super().__init__()
        dim, heads = config.shape[0] * 2**stage, config.shape[2][stage]
        self.window = config.windows[stage]
        self.norm1 = nn.LayerNorm(dim)
        self.pool_layers = nn.ModuleList(WindowPool(self.window // 2**level) for level in range(config.levels - 1))
        self.attn = FocalAttention(
            dim, heads, self.window, config.expand[stage], config.focal_windows[stage], config.levels
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma_1, self.gamma_2 = (
            None if config.layer_scale is None else nn.Parameter(torch.full((dim,), config.layer_scale)) for _ in "12"
        )
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()

    def forward(self, tokens: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        """tokens (b, h, w, d)."""
        attention, mlp = paths or (None, None)
        tokens = drop_path.add_branch(tokens, lambda part, _: self._attend(part), self.drop_path, attention)
        return drop_path.add_branch(tokens, lambda part, _: self._mlp(part), self.drop_path, mlp)

    def _attend(self, tokens: Tensor) -> Tensor:
        size = (tokens.shape[1], tokens.shape[2])
        normed = F.pad(self.norm1(tokens), (0, 0, 0, -size[1] % self.window, 0, -size[0] % self.window))
        pooled = [pool(self._cut(normed, pool.side * 2**level)) for level, pool in enumerate(self.pool_layers)]
        mixed = self.attn(normed, pooled, size)[:, : size[0], : size[1]]
        return mixed if self.gamma_1 is None else self.gamma_1 * mixed

    def _cut(self, tokens: Tensor, side: int) -> Tensor:
        """Where the parts of a window are `side` tokens together and not all of it, the middle of the map that so many
        windows of parts are; their parts then lie across windows, as in the authors' code."""
        sides = [length // self.window * side for length in tokens.shape[1:3]]
        top, left = ((length - kept) // 2 for length, kept in zip(tokens.shape[1:3], sides, strict=True))
        return tokens[:, top : top + sides[0], left : left + sides[1]]

    def _mlp(self, tokens: Tensor) -> Tensor:
        added = self.mlp(self.norm2(tokens))
        return added if self.gamma_2 is None else self.gamma_2 * added


class Projection(nn.Module):
    """A convolution at every `stride`-th place, and a norm: (b, c, h, w) -> (b, h / stride, w / stride, d).

    kernel: `stride`, or larger by 3 (of stride 4) or 1 (of stride 2), centred on what it stands for.
    """

    def __init__(self, channels: int, dim: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride=stride, padding=(kernel - stride + 1) // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, cells: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(cells), "b d h w -> b h w d"))
