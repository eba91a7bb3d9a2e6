"""Convolutions of maps whose channels come last, as pyramids hold them."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class Depthwise(nn.Conv2d):
    """A depth-wise convolution that keeps the size, of maps (b, h, w, d)."""

    def __init__(self, dim: int, kernel: int, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias)

    def forward(self, cells: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(cells, "b h w d -> b d h w")), "b d h w -> b h w d")
