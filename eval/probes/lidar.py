"""LiDAR and alignment, of several crops of each image (Thilak et al. 2024, Wang & Isola 2020).

LiDAR is the effective rank of a linear discriminant analysis in which every image is a class and its crops are the
members: directions count that tell images apart and stay when the crop changes. The encoder reads all of val anew for
every crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import Change, Column, ProbeSpec, Scores, Store
from eval.label_free import effective_rank, of_mean
from eval.scores import Z95, mean_of

BLOCKS = 10  # of images, each left out once for the error


@dataclass(frozen=True)
class LidarSettings:
    """views: crops of an image; the authors take 10 to 50. scale: their share of the image's area. delta: added to the
    diagonal of the scatter within images, the authors'."""

    views: int = 10
    scale: tuple[float, float] = (0.4, 1.0)
    delta: float = 1e-4

    def __post_init__(self) -> None:
        if self.views < 2 or not 0 < self.scale[0] <= self.scale[1] <= 1 or self.delta <= 0:
            raise ValueError(f"LiDAR needs two views, shares of the area within 0 .. 1, and a delta; got {self}")


def crops_of(seed: int, scale: tuple[float, float]) -> Change:
    """Random resized crops (area within `scale`, sides 3:4 to 4:3) with flips, by an image's number and `seed`."""

    def change(images: Tensor, ids: Tensor) -> Tensor:
        drawn = torch.from_numpy(
            np.stack([np.random.default_rng((seed, number)).random(5, dtype=np.float32) for number in ids.tolist()])
        )
        area, shape, left, top, turned = drawn.unbind(dim=1)
        side = (scale[0] + (scale[1] - scale[0]) * area).sqrt()
        stretch = ((2 * shape - 1) * math.log(4 / 3) / 2).exp()
        wide, high = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
        where = torch.zeros(len(ids), 2, 3)
        where[:, 0, 0] = torch.where(turned < 0.5, -wide, wide)
        where[:, 1, 1] = high
        where[:, 0, 2] = (1 - wide) * (2 * left - 1)
        where[:, 1, 2] = (1 - high) * (2 * top - 1)
        grid = F.affine_grid(where, list(images.shape), align_corners=False).to(images.device)
        # a crop is never made smaller, so that nothing is to be smoothed before
        found = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return found.round_().to(images.dtype)

    return change


class Scatter(NamedTuple):
    """Of n images with q crops each, by block of images: `total` (blocks, d, d) sum of x x^T, `between` (blocks, d, d)
    of image means, `means` (blocks, d) their sum, `num` (blocks,) images. All fp64."""

    total: Tensor
    between: Tensor
    means: Tensor
    num: Tensor
    views: int

    def lidar(self, without: int | None, delta: float) -> float:
        """Of all images, or without a block of them."""
        total, between, means, num = (
            each.sum(dim=0) - (0 if without is None else each[without])
            for each in (self.total, self.between, self.means, self.num)
        )
        centre = means / num
        of_means = between / num
        within = total / (num * self.views) - of_means + delta * torch.eye(len(total)).to(total)
        values, vectors = torch.linalg.eigh(within)
        root = vectors * values.clamp_min(delta).rsqrt() @ vectors.T
        spread = root @ (of_means - torch.outer(centre, centre)) @ root
        return float(effective_rank(torch.linalg.eigvalsh(spread).clamp_min(0)))


def scatter(views: Callable[[int], Tensor], num_views: int, blocks: Tensor) -> tuple[Scatter, Tensor]:
    """The scatter of `views(k)`, (n, d) features of the k-th crop of every image, with `blocks` (n,) the block of each;
    and (n,) the mean squared distance of two crops of an image, brought to length 1. A view at a time is held."""
    num = int(blocks.max()) + 1
    for view in range(num_views):
        features = views(view)
        values, unit = features.double(), F.normalize(features.double(), dim=1)
        if not view:
            dim = values.shape[1]
            total = torch.zeros(num, dim, dim).to(values)
            sums, of_units = torch.zeros_like(values), torch.zeros_like(values)
        for block in range(num):
            mine = values[blocks == block]
            total[block].addmm_(mine.T, mine)
        sums += values
        of_units += unit
    means = sums / num_views
    parts = [means[blocks == block] for block in range(num)]
    found = Scatter(
        total, torch.stack([part.T @ part for part in parts]), torch.stack([part.sum(dim=0) for part in parts]),
        torch.bincount(blocks, minlength=num).to(means), num_views,
    )  # fmt: skip
    cosine = (of_units.square().sum(dim=1) - num_views) / (num_views * (num_views - 1))
    return found, 2 - 2 * cosine


def run(store: Store, settings: LidarSettings) -> Scores:
    """LiDAR and alignment of val's headline feature; nothing for raw pixels."""
    val, name, seed = store.val, store.headline, store.seeds[0]
    if val.pooled_as == "pixels":
        return {}
    unit = torch.arange(len(val.ids)) if val.groups is None else torch.unique(val.groups, return_inverse=True)[1]
    count = int(unit.max()) + 1
    if count < 2:
        raise ValueError(f"LiDAR tells images apart, and val has {count} image or group; give more")
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % min(BLOCKS, count)
    blocks = drawn[unit]

    def view(number: int) -> Tensor:
        store.progress(f"LiDAR: crop {number + 1} of {settings.views} of {len(unit):,} images")
        again = store.again(crops_of(seed + number + 1, settings.scale), False)
        return again.inputs[name].to(store.device)

    found, distances = scatter(view, settings.views, blocks)
    left_out = [found.lidar(block, settings.delta) for block in range(len(found.num))]
    mean, value = mean_of(left_out), found.lidar(None, settings.delta)
    num = len(left_out)  # a jackknife over blocks
    error = math.sqrt((num - 1) / num * sum((each - mean) ** 2 for each in left_out))
    return {
        "input": name,
        "images": len(unit),
        "views": settings.views,
        "lidar": {
            "value": value, "standard_error": error, "interval": [value - Z95 * error, value + Z95 * error],
        },
        "alignment": of_mean(distances, val.groups),
    }  # fmt: skip


def columns(result: Scores, headline: str) -> list[Column]:
    """LiDAR in the table, alignment below it."""
    if not result:
        return []
    shared = {"key": "value", "unit": "number", "chance": None}
    return [
        Column("lidar", "LiDAR", (("lidar",),), **shared),  # type: ignore[arg-type]
        Column("alignment", "alignment", (("alignment",),), False, lower_is_better=True, more=True, **shared),  # type: ignore[arg-type]
    ]


def notes(result: Scores, settings: LidarSettings) -> list[str]:
    """What the numbers are of."""
    if not result:
        return []
    low, high = settings.scale
    return [
        f"LiDAR: {result['views']} crops ({low:g} to {high:g} of the area, flipped) of {result['images']:,} held-out "
        f"images on {result['input']}, delta {settings.delta:g}; alignment: mean squared distance of two crops of an "
        "image at length 1, lower is steadier"
    ]


SPEC = ProbeSpec("lidar", run, columns, LidarSettings, needs="encoder", labels="none", notes=notes, costly=True)
