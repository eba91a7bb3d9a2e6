"""What pyramids of residual blocks on maps (b, d, h, w) share, in the manner of ResNets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.pyramid import Pyramid


class ResidualPyramid(Pyramid):
    """A pyramid whose `net` has a `stem`, from images to maps of a fourth of their sides, and `stages` of blocks.

    A block maps (map (b, d, h, w), `drop_path.Paths` or None) to a map, the first of each stage after the first to one
    of half the sides. Norms are over each image, not over the batch, so that the outcome does not depend on which
    images share a rank. There is no final norm.
    """

    overlapping = True
    pixel_weights = ("stem.proj.weight",)
    net: nn.Module

    def embed(self, images: Tensor) -> Tensor:
        return rearrange(self.net.stem(images), "b d h w -> b h w d")

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        cells, kept = rearrange(tokens, "b h w d -> b d h w"), {}
        for index, (block, path) in enumerate(zip(self.blocks(), paths, strict=True)):
            cells = block(cells, path)
            if index in wanted:
                kept[index] = rearrange(cells, "b d h w -> b h w d")
        return rearrange(cells, "b d h w -> b h w d"), kept

    def final_norm(self, states: Tensor) -> Tensor:
        return states

    def inner(self) -> nn.Module:
        return self.net

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.net.stages for block in stage]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "stages" not in parts:
            return 0
        stage, place = (int(part) for part in parts[parts.index("stages") + 1 :][:2])
        return sum(self.depths[:stage]) + place + 1


class ConvStem(nn.Module):
    """ResNet's stem: a 7x7 convolution, and the largest of each 3x3, each of which halves the sides."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 7, stride=2, padding=3, bias=False)
        self.norm = group_norm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, d, h / 4, w / 4)."""
        return F.max_pool2d(self.norm(self.proj(images)).relu(), 3, stride=2, padding=1)


class Shortcut(nn.Sequential):
    """A map of another width, and of half the sides where `halves`: the mean of each 2x2, and a 1x1 convolution."""

    def __init__(self, dim: int, out: int, halves: bool) -> None:
        pool = nn.AvgPool2d(2) if halves else nn.Identity()
        super().__init__(pool, nn.Conv2d(dim, out, 1, bias=False), group_norm(out))


class ResidualBlock(nn.Module):
    """A shortcut plus what `branch` makes of a map, cut at zero. Subclasses implement `branch`."""

    def __init__(self, dim: int, out: int, halves: bool, drop_rate: float) -> None:
        super().__init__()
        self.shortcut = Shortcut(dim, out, halves) if halves or dim != out else nn.Identity()
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()

    def branch(self, cells: Tensor) -> Tensor:
        """What is added to the shortcut of a map (b, d, h, w)."""
        raise TypeError(f"{type(self).__name__} does not implement branch")

    def forward(self, cells: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        branch: Callable[[Tensor, Tensor | None], Tensor] = lambda _, rows: self.branch(  # noqa: E731
            cells if rows is None else cells.index_select(0, rows)
        )
        path = None if paths is None else paths.attention
        return drop_path.add_branch(self.shortcut(cells), branch, self.drop_path, path).relu()


def group_norm(width: int) -> nn.GroupNorm:
    """Over each image, in up to 32 groups of 4 channels and more."""
    return nn.GroupNorm(math.gcd(32, max(width // 4, 1)), width)


def initialise_convolutions(model: nn.Module) -> None:
    """As torchvision's ResNets: convolutions by He et al. 2015, fan out."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
