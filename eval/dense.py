"""What dense probes read beside an encoder's tokens: masks and depths of the crops, and the raw pixels of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data_pipelines.eval_loader import center_crops
from data_pipelines.eval_maps import CenterMaps
from eval.base import Masks

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from eval.protocol import Protocol

_MOST_SIDE = 16  # px of a patch as a baseline: larger ones are averaged to this
_FOR_MEAN = 256  # images whose patches make the mean


def maps_for(protocol: Protocol, dataset: Dataset, ids: Tensor, size: int) -> dict[str, Masks]:
    """The fields of a `FeatureSet` that hold what lies at each pixel, as far as a probe needs them."""
    kinds = {"masks": "mask", "depths": "depth"}
    return {name: CenterMaps(dataset, ids, size, kind=kind) for name, kind in kinds.items() if protocol.needs(kind)}


class PixelTokens:
    """The raw pixels of patches as tokens (see `eval.base.Tokens`): in 0 .. 1, less `mean` (d,), decoded when they are
    asked for. Patches of more than 16 px a side are averaged down to that.

    Args:
        dataset: Where to read.
        ids: (n,) int64 sample numbers.
        size: Side of the centre crops in px.
        grid: Rows and columns of patches, which divide `size`.
        channels, bits: Of the images.
        mean: Of a patch; None: zero.
    """

    def __init__(
        self,
        dataset: Dataset,
        ids: Tensor,
        size: int,
        grid: tuple[int, int],
        *,
        channels: int = 3,
        bits: int = 8,
        mean: Tensor | None = None,
    ) -> None:
        if size % grid[0] or size % grid[1]:
            raise ValueError(f"crops of {size} px do not divide into {grid[1]}x{grid[0]} patches")
        self.dataset, self.ids, self.size, self.grid = dataset, ids, size, grid
        self.channels, self.bits, self.mean = channels, bits, mean
        self._sides = tuple(min(size // count, _MOST_SIDE) for count in grid)
        self.dim = channels * self._sides[0] * self._sides[1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(b, t, d) float32 of the images `rows` (b,)."""
        samples = self.ids[rows].tolist()
        if not samples:
            return torch.empty(0, self.grid[0] * self.grid[1], self.dim)
        parts, found = [], []
        for images, _, numbers in center_crops(
            self.dataset, self.size, samples=samples, channels=self.channels, bits=self.bits
        ):
            found += numbers.tolist()
            parts.append(self._patches(images))
        if found != samples:
            lost = next(sample for sample in samples if sample not in found)
            raise ValueError(f"sample {self.dataset.key(lost)[0]} could be read before and can't be read any more")
        return torch.cat(parts)

    def _patches(self, images: Tensor) -> Tensor:
        pixels = images.float() / torch.iinfo(images.dtype).max
        size = (self.grid[0] * self._sides[0], self.grid[1] * self._sides[1])
        if size != pixels.shape[2:]:
            pixels = F.adaptive_avg_pool2d(pixels, size)
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", h=self.grid[0], w=self.grid[1])
        return patches if self.mean is None else patches - self.mean


def pixel_tokens(
    train: tuple[Dataset, Tensor],
    val: tuple[Dataset, Tensor],
    size: int,
    grid: tuple[int, int],
    channels: int,
    bits: int,
) -> tuple[PixelTokens, PixelTokens]:
    """Of train and of val, each a data set and sample numbers; less the mean patch of some of train's images."""
    found = PixelTokens(*train, size, grid, channels=channels, bits=bits)
    step = max(1, len(found) // _FOR_MEAN)
    mean = found[torch.arange(0, len(found), step)[:_FOR_MEAN]].mean(dim=(0, 1))
    first, second = (PixelTokens(*split, size, grid, channels=channels, bits=bits, mean=mean) for split in (train, val))
    return first, second
