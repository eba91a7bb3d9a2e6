"""Stand-alone self-attention (Ramachandran et al. 2019): a ResNet that attends to neighbourhoods."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from pretrain.encoders.local_attention.config import LocalAttentionConfig
from pretrain.encoders.local_attention.neighbourhood import AttentionStem, NeighbourAttention
from pretrain.encoders.residual import (
    ConvStem,
    ResidualBlock,
    ResidualPyramid,
    group_norm,
    initialise_convolutions,
)

_EXPANSION = 4


class LocalAttentionEncoder(ResidualPyramid):
    """Stand-alone self-attention behind the Encoder seam.

    On a compact map a neighbourhood is of the units that were moved beside each other.
    """

    def __init__(
        self, config: LocalAttentionConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth = config.shape, sum(config.shape)
        self.dim = _EXPANSION * config.dim * 2 ** (len(self.depths) - 1)
        self.net = LocalAttentionNet(config, channels)
        self.make_mask_token(config.dim, mask_token)

    def no_decay(self, parameter_name: str) -> bool:
        return parameter_name.endswith((".rows", ".columns"))  # tables of places


class LocalAttentionNet(nn.Module):
    """The modules: stem, stages.N.M."""

    def __init__(self, config: LocalAttentionConfig, channels: int) -> None:
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
                blocks.append(Bottleneck(width, dim, config.heads, config.kernel, halves, next(rates)))
                width = _EXPANSION * dim
            self.stages.append(blocks)
        initialise_convolutions(self)


class Bottleneck(ResidualBlock):
    """1x1 convolution, attention to the neighbourhood, 1x1 convolution; where it halves the sides, the mean of each
    2x2 after attention."""

    def __init__(self, width: int, dim: int, heads: int, kernel: int, halves: bool, drop_rate: float) -> None:
        super().__init__(width, _EXPANSION * dim, halves, drop_rate)
        self.reduce = nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), group_norm(dim))
        self.attn = NeighbourAttention(dim, heads, kernel)
        self.pool = nn.AvgPool2d(2) if halves else nn.Identity()
        self.norm = group_norm(dim)
        self.expand = nn.Sequential(nn.Conv2d(dim, _EXPANSION * dim, 1, bias=False), group_norm(_EXPANSION * dim))

    def branch(self, cells: Tensor) -> Tensor:
        mixed = self.pool(self.attn(self.reduce(cells).relu()))
        return self.expand(self.norm(mixed).relu())
