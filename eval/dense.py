"""What dense probes read beside an encoder's tokens: masks and depths of the crops, and the raw pixels of patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data_pipelines.eval_loader import center_crops, whole_images
from data_pipelines.eval_maps import CenterMaps, WholeMaps
from eval.patches import AnyMasks

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from eval.protocol import Protocol
    from eval.target import Target

_MOST_SIDE = 16  # px of a patch as a baseline: larger ones are averaged to this
_FOR_MEAN = 256  # images whose patches make the mean


def maps_for(protocol: Protocol, dataset: Dataset, ids: Tensor, target: Target) -> dict[str, AnyMasks]:
    """The fields of a `FeatureSet` that hold what lies at each pixel, as far as a probe needs them."""
    kinds = {name: kind for name, kind in (("masks", "mask"), ("depths", "depth")) if protocol.needs(kind)}
    if target.native:
        most, patch = target.most_patches, target.encoder.patch
        return {name: WholeMaps(dataset, ids, most, patch, kind=kind) for name, kind in kinds.items()}
    return {name: CenterMaps(dataset, ids, target.image_size, kind=kind) for name, kind in kinds.items()}


def images_of(
    dataset: Dataset, samples: Sequence[int], target: Target
) -> Iterator[tuple[Sequence[Tensor | np.ndarray], list[int]]]:
    """The images (c, h, w) of these samples as the target sees them, some at a time, and their numbers."""
    kind: dict = {"samples": samples, "channels": target.channels, "bits": target.bits}
    if target.native:
        found = whole_images(dataset, target.most_patches, target.encoder.patch, **kind)
        yield from ((images, numbers.tolist()) for images, _, numbers in found)
        return
    for images, _, numbers in center_crops(dataset, target.image_size, **kind):
        yield list(images), numbers.tolist()


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
        _check_all_there(self.dataset, samples, found)
        return torch.cat(parts)

    def _patches(self, images: Tensor) -> Tensor:
        patches = _patches_of(images, self.grid, (self._sides[0], self._sides[1]))
        return patches if self.mean is None else patches - self.mean


class NativePixelTokens:
    """The raw pixels of patches of images at their own shape (see `eval.base.NativeTokens`), as `PixelTokens` has them.

    Args:
        dataset: Where to read.
        ids: (n,) int64 sample numbers.
        grids: (n, 2) rows and columns of each image's patches.
        target: How images are seen.
        mean: Of a patch; None: zero.
    """

    def __init__(
        self, dataset: Dataset, ids: Tensor, grids: Tensor, target: Target, mean: Tensor | None = None
    ) -> None:
        self.dataset, self.ids, self.grids, self.mean, self._target = dataset, ids, grids, mean, target
        self._side = min(target.encoder.patch, _MOST_SIDE)
        self.dim = target.channels * self._side**2

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, rows: Tensor) -> list[Tensor]:
        """(t_i, d) float32 of each of the images `rows` (b,)."""
        samples, found, numbers = self.ids[rows].tolist(), [], []
        for images, which in images_of(self.dataset, samples, self._target) if samples else ():
            numbers += which
            found += [torch.as_tensor(image) for image in images]
        _check_all_there(self.dataset, samples, numbers)
        patches = []
        for image, (high, wide) in zip(found, self.grids[rows].tolist(), strict=True):
            patches.append(_patches_of(image[None], (high, wide), (self._side, self._side))[0])
        return patches if self.mean is None else [each - self.mean for each in patches]


def _patches_of(images: Tensor, grid: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """(b, t, c * p * q) in 0 .. 1 of the patches of images (b, c, h, w), averaged down to `sides` px each."""
    pixels = images.float() / torch.iinfo(images.dtype).max
    size = (grid[0] * sides[0], grid[1] * sides[1])
    if size != pixels.shape[2:]:
        pixels = F.adaptive_avg_pool2d(pixels, size)
    return rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", h=grid[0], w=grid[1])


def _check_all_there(dataset: Dataset, samples: list[int], found: list[int]) -> None:
    if found != samples:
        lost = next(sample for sample in samples if sample not in found)
        raise ValueError(f"sample {dataset.key(lost)[0]} could be read before and can't be read any more")


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
    mean = found[_for_mean(len(found))].mean(dim=(0, 1))
    first, second = (PixelTokens(*split, size, grid, channels=channels, bits=bits, mean=mean) for split in (train, val))
    return first, second


def native_pixel_tokens(
    train: tuple[Dataset, Tensor, Tensor], val: tuple[Dataset, Tensor, Tensor], target: Target
) -> tuple[NativePixelTokens, NativePixelTokens]:
    """The same at each image's own shape: a data set, sample numbers and grids."""
    found = NativePixelTokens(*train, target)
    mean = torch.cat(found.images(_for_mean(len(found)))).mean(dim=0)
    return NativePixelTokens(*train, target, mean), NativePixelTokens(*val, target, mean)


def _for_mean(num: int) -> Tensor:
    return torch.arange(0, num, max(1, num // _FOR_MEAN))[:_FOR_MEAN]
