"""Patches against pixels: what lies in each patch of an image, and what is said of each pixel from that of patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from eval.base import IGNORED, FeatureSet, Masks, NativeMasks, NativeTokens, Tokens

#: Numbers of classes of pixels held at once, as float32: 64 MiB.
_AT_ONCE = 2**24
_BATCH = 64  # images read at a time


#: Of images of one size, or at their own shape.
AnyTokens: TypeAlias = Tokens | NativeTokens
AnyMasks: TypeAlias = Masks | NativeMasks


def beside(features: FeatureSet, maps: AnyMasks | None, what: str, split: str) -> tuple[AnyTokens, AnyMasks]:
    """The patch tokens of a split and the `maps` of its pixels; ValueError where there are none, which names `what`."""
    if features.tokens is None or maps is None:
        missing = what if features.tokens is not None else "tokens of patches"
        raise ValueError(f"a probe of pixels needs {what} and tokens of patches, and {split} has no {missing}")
    if not len(maps.rows):
        raise ValueError(
            f"no image of {split} has {what}; pack images with theirs: `selfsight pack IMAGES SHARDS --{what} FOLDER`"
        )
    return features.tokens, maps


class Levels:
    """The classes of masks, numbered in the order in which they are met: masks may hold any whole numbers."""

    def __init__(self) -> None:
        self.levels: list[int] = []

    def __len__(self) -> int:
        return len(self.levels)

    def numbered(self, masks: Tensor) -> Tensor:
        """(b, h, w) int64 with classes 0 .. len(self) - 1 for any levels; `IGNORED` stays."""
        found, places = masks.unique(return_inverse=True)
        known = {level: number for number, level in enumerate(self.levels)} | {IGNORED: IGNORED}
        for level in found.tolist():
            if level not in known:
                known[level] = len(self.levels)
                self.levels.append(level)
        return torch.tensor([known[level] for level in found.tolist()], dtype=torch.int64)[places]


def shares(masks: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """(b, t, classes) float32: the share of each patch's pixels that each class has, of masks (b, h, w) of 0 ..
    num_classes - 1. Pixels that are `IGNORED` are nobody's; of a patch of nothing else all shares are 0."""
    patches = _in_patches(masks, grid)
    cells = torch.arange(patches.shape[0] * patches.shape[1]).view(*patches.shape[:2], 1)
    judged = patches != IGNORED
    places = (cells * num_classes + patches)[judged]
    counts = torch.bincount(places, minlength=patches.shape[0] * patches.shape[1] * num_classes)
    counts = counts.view(*patches.shape[:2], num_classes).float()
    return counts / judged.sum(dim=2, keepdim=True).clamp_min(1)


def means(numbers: Tensor, grid: tuple[int, int]) -> Tensor:
    """(b, t) float32: the mean of what is known of each patch, of numbers (b, h, w); NaN where nothing is."""
    return _in_patches(numbers, grid).nanmean(dim=2)


def _in_patches(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """(b, t, pixels of a patch)."""
    height, width = values.shape[1:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(
            f"masks of {width}x{height} px do not divide into {grid[1]}x{grid[0]} patches; crop images and masks to a "
            "multiple of the encoder's stride (--image-size)"
        )
    return rearrange(values, "b (h p) (w q) -> b (h w) (p q)", h=grid[0], w=grid[1])


def pixel_classes(logits: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(b, h, w) int64: the class of each pixel by patches' logits (b, t, classes), between patches bilinear."""
    maps = rearrange(logits, "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    at_once = max(1, _AT_ONCE // (logits.shape[2] * size[0] * size[1]))
    parts = (
        F.interpolate(part, size=size, mode="bilinear", align_corners=False).argmax(dim=1)
        for part in maps.split(at_once)
    )
    return torch.cat([*parts])


def overlaps(predicted: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """(b, classes, 2) int64: of each image and class the pixels that are it and said to be it, and those that are
    either. Both (b, h, w), predicted 0 .. num_classes - 1; what masks ignore counts for nothing."""
    judged = masks != IGNORED
    nobody = torch.tensor(num_classes)
    first = torch.arange(len(masks)).view(-1, 1, 1) * (num_classes + 1)

    def counted(classes: Tensor, which: Tensor) -> Tensor:
        places = first + torch.where(which, classes, nobody)
        counts = torch.bincount(places.flatten(), minlength=len(masks) * (num_classes + 1))
        return counts.view(len(masks), num_classes + 1)[:, :-1]

    both = counted(masks, judged & (predicted == masks))
    either = counted(masks, judged) + counted(predicted, judged) - both
    return torch.stack([both, either], dim=2)


@dataclass(frozen=True)
class Drawn:
    """Patches drawn from images.

    features: (n, d) float32. targets: (n, ..) float32. images: (n,) int64, the rows they are of.
    """

    features: Tensor
    targets: Tensor
    images: Tensor

    def of(self, images: Tensor) -> Drawn:
        """Those of some images."""
        chosen = torch.isin(self.images, images)
        return Drawn(self.features[chosen], self.targets[chosen], self.images[chosen])

    def first(self, most: int) -> Drawn:
        return Drawn(self.features[:most], self.targets[:most], self.images[:most])


def draw_images(rows: Tensor, most: int | None, generator: torch.Generator) -> Tensor:
    """(m,) int64, ascending: `most` of the images `rows` (n,), or all."""
    if most is None or len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:most].sort().values]


def draw_places(counts: Tensor, most: int, generator: torch.Generator) -> list[Tensor]:
    """Which patches are taken of each image, of so many (n,): (k_i,) int64, so that all together are about `most`."""
    if not len(counts):
        return []
    each, largest = max(1, most // len(counts)), int(counts.max())
    noise = torch.rand(len(counts), largest, generator=generator)
    order = noise.masked_fill(torch.arange(largest) >= counts[:, None], 2.0).argsort(dim=1)
    return [places[: min(each, count)] for places, count in zip(order, counts.tolist(), strict=True)]


def patch_counts(tokens: AnyTokens, rows: Tensor) -> Tensor:
    """(m,) int64 how many tokens each of the images `rows` (m,) has."""
    if isinstance(tokens, NativeTokens):
        return tokens.grids[rows].prod(dim=1)
    return torch.full((len(rows),), tokens.grid[0] * tokens.grid[1])


class Patches(NamedTuple):
    """Images of one grid of patches: `rows` (b,), their tokens (b, t, d), and masks or depths (b, h, w)."""

    rows: Tensor
    tokens: Tensor
    masks: Tensor
    grid: tuple[int, int]

    def at(self, places: Sequence[Tensor]) -> Tensor:
        """(k, d) the tokens of these places (k_i,) of each image."""
        return taken(self.tokens, places)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the masks."""
        return self.masks.shape[1], self.masks.shape[2]


def taken(values: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Of values (b, t, ...) of b images those (k, ...) of the places (k_i,) of each."""
    return torch.cat([of_image[chosen] for of_image, chosen in zip(values, places, strict=True)])


def batches(tokens: AnyTokens, masks: AnyMasks, rows: Tensor) -> Iterator[Patches]:
    """The images `rows` in order, some at a time, one by one where they have shapes of their own; ValueError for tokens
    not finite."""
    for part in rows.split(_BATCH):
        for found in _read(tokens, masks, part):
            if not found.tokens.isfinite().all():
                raise ValueError(
                    "tokens of patches are not finite: the encoder's weights are damaged, or its training diverged; "
                    "probe an earlier checkpoint"
                )
            yield found


def _read(tokens: AnyTokens, masks: AnyMasks, rows: Tensor) -> Iterator[Patches]:
    if not isinstance(tokens, NativeTokens):
        assert not isinstance(masks, NativeMasks), "masks of their own shape beside tokens of one grid"
        yield Patches(rows, tokens[rows], masks[rows], tokens.grid)
        return
    assert isinstance(masks, NativeMasks), "masks of one size beside tokens of many grids"
    grids = tokens.grids[rows].tolist()
    for row, values, mask, grid in zip(rows.split(1), tokens.images(rows), masks.images(rows), grids, strict=True):
        yield Patches(row, values[None], mask[None], (grid[0], grid[1]))


def padded(parts: Sequence[Tensor], classes: int, dim: int) -> Tensor:
    """Joined along the first dimension; along `dim` those are filled up with zeros that were made when fewer classes
    were known."""
    filled = []
    for part in parts:
        shape = [*part.shape]
        shape[dim] = classes - shape[dim]
        filled.append(torch.cat([part, part.new_zeros(shape)], dim=dim))
    return torch.cat(filled)
