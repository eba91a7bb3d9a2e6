"""From pixels to patch tokens: what `stem` names beside timm's one convolution. Each gives (b, h, w, d)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed
from torch import Tensor, nn


class Stem(nn.Module):
    """What timm asks of a patch embedding."""

    def __init__(self, img_size: tuple[int, int], patch_size: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]


class ConvStem(Stem):
    """Stride-2 3x3 convolutions instead of one large patch projection (Early Convolutions, Xiao et al. 2021).

    The paper normalises over the batch; here it is over each image, so that the result does not depend on which
    images share a rank. Over the channels of each pixel it would give flat regions the weight of strokes.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **_: Any
    ) -> None:
        super().__init__(img_size, patch_size)
        layers: list[nn.Module] = []
        num_halvings = patch_size.bit_length() - 1
        width = in_chans
        for halving in range(num_halvings):
            out = max(8, embed_dim // 2 ** (num_halvings - halving))
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, out), nn.ReLU()]
            width = out
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, embed_dim, 1, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(self.convs(images)), "b d h w -> b h w d")


class NormedStem(Stem):
    """A patch's pixels normalised, projected, and normalised again (Dehghani et al. 2023, NaViT; Kumar et al. 2023)."""

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **_: Any
    ) -> None:
        super().__init__(img_size, patch_size)
        self.norm_pixels = nn.LayerNorm(in_chans * patch_size**2)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        p, q = self.patch_size
        pixels = self.norm_pixels(rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=p, q=q))
        return self.norm(F.linear(pixels, rearrange(self.proj.weight, "d c p q -> d (c p q)"), self.proj.bias))


class MlpStem(Stem):
    """A patch's pixels through two linear layers with a GELU between them."""

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **_: Any
    ) -> None:
        super().__init__(img_size, patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)
        self.fc = nn.Linear(embed_dim, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.gelu(rearrange(self.proj(images), "b d h w -> b h w d")))


class OverlappingStem(Stem):
    """One convolution that reads nearly a patch more on each side, as PVT v2's (Wang et al. 2022), and a norm."""

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **_: Any
    ) -> None:
        super().__init__(img_size, patch_size)
        side, beyond = 2 * patch_size - 1, patch_size - 1
        self.proj = nn.Conv2d(in_chans, embed_dim, side, stride=patch_size, padding=beyond, bias=bias)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(images), "b d h w -> b h w d"))


STEMS = {"patch": PatchEmbed, "norm": NormedStem, "mlp": MlpStem, "conv": ConvStem, "overlap": OverlappingStem}
#: Those that read beyond the patch of a token.
OVERLAPPING = ("conv", "overlap")
