"""Recursive gated convolution (Rao et al. 2022, section 3.1), and the filters that it looks around with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders.convolutions import Depthwise

EPS = 1e-6  # of all norms


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, of maps (b, h, w, d)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, 1)

    def forward(self, cells: Tensor) -> Tensor:
        return F.linear(cells, rearrange(self.weight, "o i 1 1 -> o i"), self.bias)


class GlobalFilter(nn.Module):
    """Half of the channels through a 3x3 convolution, half through a filter of all frequencies of the map.

    frequencies: rows, and half of the columns + 1, of the map that the filter is made for. On other maps it is
    resized, bilinearly, its corners staying corners.
    """

    def __init__(self, dim: int, frequencies: tuple[int, int]) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim, eps=EPS)
        self.dw = Depthwise(dim // 2, 3, bias=False)
        # real and imaginary part
        self.complex_weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim // 2, *frequencies, 2), std=0.02))
        self.post_norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, cells: Tensor) -> Tensor:
        """Maps (b, h, w, d)."""
        near, far = self.pre_norm(cells).chunk(2, dim=-1)
        with torch.autocast(cells.device.type, enabled=False):  # transforms of half precision know few sizes
            far = self._filtered(far.float())
        mixed = torch.stack([self.dw(near), far.to(near.dtype)], dim=-1)
        return self.post_norm(rearrange(mixed, "b h w d two -> b h w (d two)"))

    def _filtered(self, cells: Tensor) -> Tensor:
        height, width = cells.shape[1], cells.shape[2]
        weight = rearrange(self.complex_weight.float(), "d h w two -> two d h w")
        wanted = (height, width // 2 + 1)
        if weight.shape[2:] != wanted:
            weight = F.interpolate(weight, size=wanted, mode="bilinear", align_corners=True)
        # not view_as_complex, which wants its numbers to begin at an even place of the storage
        response = rearrange(torch.complex(weight[0], weight[1]), "d h w -> h w d")
        spectrum = torch.fft.rfft2(cells, dim=(1, 2), norm="ortho") * response
        return torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2), norm="ortho")


class GatedConvolution(nn.Module):
    """gnConv: features that are multiplied `order` times by what lies around them, their width doubling each time.

    scale: of what lies around, s in the paper's equation 3.5. frequencies: of a global filter; None: 7x7 convolution.
    """

    def __init__(self, dim: int, order: int, scale: float, frequencies: tuple[int, int] | None) -> None:
        super().__init__()
        self.dims = [dim // 2**left for left in reversed(range(order))]
        self.scale = scale
        self.proj_in = Pointwise(dim, 2 * dim)
        around = sum(self.dims)
        self.dwconv = Depthwise(around, 7) if frequencies is None else GlobalFilter(around, frequencies)
        self.pws = nn.ModuleList(
            Pointwise(narrow, wide) for narrow, wide in zip(self.dims, self.dims[1:], strict=False)
        )
        self.proj_out = Pointwise(dim, dim)

    def forward(self, cells: Tensor) -> Tensor:
        """Maps (b, h, w, d)."""
        features, around = self.proj_in(cells).split([self.dims[0], sum(self.dims)], dim=-1)
        first, *gates = (self.dwconv(around) * self.scale).split(self.dims, dim=-1)
        features = features * first
        for widen, gate in zip(self.pws, gates, strict=True):
            features = widen(features) * gate
        return self.proj_out(features)
