"""ResNets that attend to neighbourhoods (Ramachandran et al. 2019) or, in the end, to whole maps (Srinivas et al.
2021)."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from pretrain.encoders.local_attention.config import LocalAttentionConfig
from pretrain.encoders.local_attention.neighbourhood import AttentionStem, NeighbourAttention
from pretrain.encoders.local_attention.whole_map import MapAttention
from pretrain.encoders.positions import resize_line
from pretrain.encoders.residual import (
    ConvStem,
    ResidualBlock,
    ResidualPyramid,
    group_norm,
    initialise_convolutions,
)

_EXPANSION = 4
_TABLES = ("rows", "columns")  # of places


class LocalAttentionEncoder(ResidualPyramid):
    """Stand-alone self-attention, or a bottleneck transformer, behind the Encoder seam.

    On a compact map a neighbourhood is of the units that were moved beside each other.
    """

    def __init__(
        self, config: LocalAttentionConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth = config.shape, sum(config.shape)
        self.dim = _EXPANSION * config.dim * 2 ** (len(self.depths) - 1)
        self.net = LocalAttentionNet(config, image_size, channels)
        self.make_mask_token(config.dim, mask_token)

    def no_decay(self, parameter_name: str) -> bool:
        return parameter_name.endswith(_TABLES)

    def resized(self, key: str, value: Tensor, wanted: Tensor) -> Tensor | None:
        line = ".places." in key and key.endswith(_TABLES) and value.shape[1] == wanted.shape[1]
        return resize_line(value, len(wanted)) if line and value.shape != wanted.shape else None


class LocalAttentionNet(nn.Module):
    """The modules: stem, stages.N.M."""

    def __init__(self, config: LocalAttentionConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        rates = iter(np.linspace(0, config.drop_path, sum(config.shape)).tolist())
        if config.stem == "conv":
            self.stem: nn.Module = ConvStem(channels, config.dim)
        else:
            self.stem = AttentionStem(channels, config.dim, config.heads, config.mixtures)
        self.stages, width = nn.ModuleList(), config.dim
        for stage, depth in enumerate(config.shape):
            blocks = nn.ModuleList()
            for place in range(depth):
                dim, halves = config.dim * 2**stage, stage > 0 and place == 0
                side = config.patch * 2 ** (stage - halves)  # px of a cell that this block attends from
                grid = (image_size[0] // side, image_size[1] // side)
                mixer = mixer_of(config, dim, grid, last=stage == len(config.shape) - 1)
                blocks.append(Bottleneck(width, dim, mixer, halves, next(rates)))
                width = _EXPANSION * dim
            self.stages.append(blocks)
        initialise_convolutions(self)


def mixer_of(config: LocalAttentionConfig, dim: int, grid: tuple[int, int], last: bool) -> nn.Module:
    """What looks beyond a cell in a block of maps (b, dim, h, w), of the last stage or of one before."""
    if config.attention == "local":
        return NeighbourAttention(dim, config.heads, config.kernel)
    if last:
        return MapAttention(dim, config.heads, dim // config.heads, grid, config.places)
    return nn.Conv2d(dim, dim, 3, padding=1, bias=False)


class Bottleneck(ResidualBlock):
    """1x1 convolution, `mixer`, 1x1 convolution; where it halves the sides, the mean of each 2x2 after the mixer."""

    def __init__(self, width: int, dim: int, mixer: nn.Module, halves: bool, drop_rate: float) -> None:
        super().__init__(width, _EXPANSION * dim, halves, drop_rate)
        self.reduce = nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), group_norm(dim))
        self.attn = mixer
        self.pool = nn.AvgPool2d(2) if halves else nn.Identity()
        self.norm = group_norm(dim)
        self.expand = nn.Sequential(nn.Conv2d(dim, _EXPANSION * dim, 1, bias=False), group_norm(_EXPANSION * dim))

    def branch(self, cells: Tensor) -> Tensor:
        mixed = self.pool(self.attn(self.reduce(cells).relu()))
        return self.expand(self.norm(mixed).relu())
