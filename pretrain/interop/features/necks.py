"""From the maps of an encoder to those of a detector, all of one width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

LEAST_WIDTH = 8  # of what lies between two deconvolutions
SUBSAMPLED_AFTER = 5  # the level whose every second cell is the next, as detectors have p6


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid (Li et al. 2022, section 3): every level from the last map alone.

    Finer levels by deconvolutions of stride 2, which halve the width, with a norm and GELU between two; coarser ones by
    max pooling; then a 1x1 and a 3x3 convolution, each with a norm over the channels.

    dim: of the map. at: its level, log2 of its stride. levels: wanted; those beyond p5 are every second cell of the
    level before.
    """

    def __init__(self, dim: int, at: int, levels: Sequence[int], width: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.paths = nn.ModuleDict()
        for level in self.levels:
            if level > SUBSAMPLED_AFTER and level != self.levels[0]:
                continue
            scaled, wide = _rescale(dim, at - level)
            self.paths[f"p{level}"] = nn.Sequential(
                *scaled,
                nn.Conv2d(wide, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"c4": (b, dim, h, w)} to {"p2": (b, width, 4 h, 4 w), ...}."""
        (last,) = maps.values()
        found = {name: path(last) for name, path in self.paths.items()}
        return _subsampled(found, self.levels)


def _rescale(dim: int, halvings: int) -> tuple[list[nn.Module], int]:
    """Layers that make a map finer by 2 ** `halvings` (coarser where negative), and the width that they leave."""
    if halvings <= 0:
        return ([nn.MaxPool2d(2**-halvings)] if halvings else []), dim
    layers: list[nn.Module] = []
    for step in range(halvings):
        narrow = max(dim // 2, min(dim, LEAST_WIDTH))
        layers.append(nn.ConvTranspose2d(dim, narrow, 2, stride=2))
        if step < halvings - 1:
            layers += [LayerNorm2d(narrow), nn.GELU()]
        dim = narrow
    return layers, dim


class StagePyramid(nn.Module):
    """The maps of a pyramid's own stages, each through a norm (the last has the encoder's), and a feature pyramid
    network over them (Lin et al. 2017).

    dims: of each stage's map by its level. levels: wanted; coarser ones than the last stage's are every second cell.
    """

    def __init__(self, dims: dict[int, int], levels: Sequence[int], width: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.used = [level for level in dims if level in self.levels]
        self.fpn = FeaturePyramidNetwork([dims[level] for level in self.used], width)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"c2": (b, d, h, w), "c3": (b, 2 d, h / 2, w / 2), ...} to {"p2": (b, width, h, w), ...}."""
        found = self.fpn({f"p{level}": maps[f"c{level}"] for level in self.used})
        return _subsampled(dict(found), self.levels)


def _subsampled(found: dict[str, Tensor], levels: Sequence[int]) -> dict[str, Tensor]:
    """With the coarser ones of `levels`: every second cell of the level before."""
    for level in levels:
        if f"p{level}" not in found:
            found[f"p{level}"] = F.max_pool2d(found[f"p{level - 1}"], 1, stride=2)
    return {f"p{level}": found[f"p{level}"] for level in levels}
