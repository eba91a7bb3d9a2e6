"""What a probe of pixels says of some val images, to be looked at: the worst and the middle ones, beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data_pipelines.files import atomic_write
from eval.base import IGNORED, Painted
from eval.patch_heads import Head
from eval.patches import AnyMasks, AnyTokens, Levels, batches, overlaps, pixel_classes

if TYPE_CHECKING:
    from PIL.Image import Image

    from data_pipelines.checks.contact_sheet import Tile
    from data_pipelines.datasets.dataset import Dataset
    from eval.target import Target

_OF_EACH = 3  # of the worst images, and of the middle ones
_SIDE = 112  # px of a picture
_COLOURS = 256  # of the file, which makes it a third as large
_MOST_NAMED = 4
_SWATCH, _MOST_COLOURS = 10, 40  # px of a colour of the legend, and how many
_TITLES = {"knn": "k-NN"}


def mean_ious(counts: Tensor) -> Tensor:
    """(m,) float32, of `overlaps` (m, classes, 2): the mean over the classes that are in an image or were said to be;
    NaN where no pixel is judged."""
    both, either = counts.unbind(2)
    present = either > 0
    return (both / either.clamp_min(1)).sum(dim=1) / present.sum(dim=1)


def worst_and_middle(ious: Tensor, each: int = _OF_EACH) -> Tensor:
    """(k,) int64 places of the `each` lowest of `ious` (m,), then of those around the median; of few all, ascending."""
    order = ious.argsort(stable=True)
    order = order[~ious[order].isnan()]
    if len(order) <= 2 * each:
        return order
    first = max(each, (len(order) - each) // 2)
    return torch.cat([order[:each], order[first : first + each]])


def examples(
    heads: Mapping[str, Head],
    counts: Tensor,
    tokens: AnyTokens,
    masks: AnyMasks,
    images: Tensor,
    levels: Levels,
    names: Mapping[int, str],
) -> Painted:
    """The masks of some `images` (m,), and what each head says of them.

    counts: `overlaps` (m, classes, 2) of the head that says which images are shown. names: of levels, in words.
    """
    rows = images[worst_and_middle(mean_ious(counts))]
    known = torch.tensor(levels.levels)
    maps: dict[str, list[Tensor]] = {"true": [], **{name: [] for name in heads}}
    words: dict[str, list[str]] = {name: [] for name in maps}
    for part in batches(tokens, masks, rows):
        maps["true"] += part.masks
        words["true"] += [_named(each, names) for each in part.masks]
        for name, head in heads.items():
            predicted = pixel_classes(head(part.tokens), part.grid, part.size)
            ious = mean_ious(overlaps(predicted, levels.numbered(part.masks), len(levels)))
            maps[name] += known[predicted]
            title = _TITLES.get(name, name)
            words[name] += [f"{title}: mIoU {100 * iou:.1f}" for iou in ious.tolist()]
    return Painted(rows, maps, words)


def _named(mask: Tensor, names: Mapping[int, str]) -> str:
    """The classes of a mask, largest first."""
    found, sizes = mask[mask != IGNORED].unique(return_counts=True)
    told = [names.get(level, str(level)) for level in found[sizes.argsort(descending=True)].tolist()]
    return ", ".join(told[:_MOST_NAMED]) + (", .." if len(told) > _MOST_NAMED else "")


def sheet(painted: Painted, dataset: Dataset, ids: Tensor, target: Target, title: str) -> Image:
    """A row an image: its crop, then each map over it. `ids` (n,): the sample numbers of val's rows."""
    from data_pipelines.checks.contact_sheet import Display, Tile, fitted, grid
    from data_pipelines.checks.map_pictures import coloured
    from eval.dense import images_of

    rows = []
    samples = ids[painted.rows].tolist()
    for crops, numbers in images_of(dataset, samples, target):
        for crop, sample in zip(crops, numbers, strict=True):
            pixels = rearrange(np.asarray(crop), "c h w -> h w c")
            picture, place = Display(pixels).rgb(pixels), samples.index(sample)
            tiles = [Tile(fitted(picture, _SIDE), (dataset.key(sample)[0],))]
            for name, maps in painted.maps.items():
                mask = maps[place].numpy()
                levels = np.where(mask == IGNORED, np.iinfo(np.uint16).max, mask).astype(np.uint16)
                tiles.append(Tile(fitted(coloured(picture, levels), _SIDE), (painted.words[name][place],)))
            rows.append(tiles)
    return grid([*rows, *_legend(painted, dataset.mask_names, len(rows[0]) if rows else 1)], title)


def _legend(painted: Painted, names: Mapping[int, str], across: int) -> list[list[Tile]]:
    """Rows of the colours of the classes that are shown, each over its name; the background has none."""
    from PIL import Image as Images

    from data_pipelines.checks.contact_sheet import Tile
    from data_pipelines.checks.map_pictures import BACKGROUND, colour_of

    levels = sorted({level for maps in painted.maps.values() for each in maps for level in each.unique().tolist()})
    tiles = [
        Tile(Images.new("RGB", (_SIDE, _SWATCH), colour_of(level)), (names.get(level, str(level)),))
        for level in levels
        if level not in (IGNORED, BACKGROUND)
    ][:_MOST_COLOURS]
    return [tiles[first : first + across] for first in range(0, len(tiles), across)]


def write_sheets(
    painted: Mapping[str, Painted], dataset: Dataset, ids: Tensor, target: Target, result: Path
) -> list[Path]:
    """A small PNG for each probe beside its result; of a run among its pictures, too, where report and wandb look:
    those there are returned."""
    of_run = []
    for name, each in painted.items():
        title = f"{name}: val images of the worst and, below, of the middle mIoU of the linear layer"
        places = [result.with_suffix(f".{name}.png")]
        if target.run is not None:
            (target.run / "pictures").mkdir(exist_ok=True)
            of_run.append(target.run / "pictures" / f"{name}-{target.step or 0:08d}.png")
            places.append(of_run[-1])
        drawn = sheet(each, dataset, ids, target, title).quantize(_COLOURS)
        for place in places:
            with atomic_write(place) as file:
                drawn.save(file, "PNG", optimize=True)
    return of_run


def told_classes(of_class: Mapping[str, float | None], names: Mapping[str, str]) -> Sequence[str]:
    """Of each class, by its level, the intersection over union as `cat: 41.2`, the worst first."""
    known = sorted((value, level) for level, value in of_class.items() if value is not None)
    return [f"{names.get(level, level)}: {100 * value:.1f}" for value, level in known]
