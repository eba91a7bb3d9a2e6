"""What I-JEPA sees and predicts of each image: blocks of one size a step, in places of its own (imports no torch).

All is a function of (seed, step, row of the global batch). That every image of a step sees equally many units is a
property of the whole step, which whoever draws one row of it finds out for itself.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import rearrange

from data_pipelines.rng import DrawFields, Purpose, Stream, stream_keys, uniform_table

if TYPE_CHECKING:
    from pretrain.methods.ijepa.config import IjepaConfig

_TRIES = 20
_SIZES = 0xB10C  # a word after the step in the keys of its sizes, beyond any row
_CUT = 0xC07  # in those of what is left out


class Plan(NamedTuple):
    """A step's blocks on a grid of units.

    target: (h, w) of each target block. corners: (rows, targets, 2) int64, their first row and column.
    context: (rows, gh, gw) bool, what each image might see. count: how many units each sees.
    """

    target: tuple[int, int]
    corners: np.ndarray[Any, np.dtype[np.int64]]
    context: np.ndarray[Any, np.dtype[np.bool_]]
    count: int


def block_size(grid: tuple[int, int], scale: float, aspect: float, within: bool) -> tuple[int, int]:
    """(h, w) of a block with a `scale` share of the grid's units and h / w = `aspect`; `within`: one short of the
    grid's sides at most, as the authors' code has it."""
    area = int(grid[0] * grid[1] * scale)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    most = [side - 1 if within else side for side in grid]
    return max(1, min(height, most[0])), max(1, min(width, most[1]))


def _sizes(settings: IjepaConfig, grid: tuple[int, int], seed: int, step: int) -> tuple[tuple[int, int], ...]:
    """Of a target block and of the context, of one step."""
    stream, published = Stream(seed, Purpose.MASKS, step, _SIZES), settings.sampling == "as_published"
    scale = stream.random()
    context = stream.random()
    aspect = scale if published else stream.random()

    def between(ends: tuple[float, float], share: float) -> float:
        return ends[0] + (ends[1] - ends[0]) * share

    target = block_size(grid, between(settings.target_scale, scale), between(settings.target_aspect, aspect), published)
    return target, block_size(grid, between(settings.context_scale, context), 1.0, published)


@lru_cache(maxsize=8)  # of a few steps: each of their rows asks
def plan(settings: IjepaConfig, grid: tuple[int, int], rows: int, seed: int, step: int) -> Plan:
    """The blocks of all `rows` of a step. Sides are tried again, 20 times at most, where an image would see too little;
    then the context is all that is no target."""
    target, seen = _sizes(settings, grid, seed, step)
    count = settings.targets
    for attempt in range(_TRIES + 1):
        keys = stream_keys(seed, Purpose.MASKS, step, np.arange(rows), attempt)
        drawn = rearrange(uniform_table(keys, 2 * (count + 1)), "r (n two) -> r n two", two=2)
        less = 0 if settings.sampling == "fair" else 1
        corners = [
            (drawn[:, place] * [max(1, side - part + 1 - less) for side, part in zip(grid, size, strict=True)])
            for place, size in zip(
                (slice(count), slice(count, count + 1)), (target, seen if attempt < _TRIES else grid), strict=True
            )
        ]
        targets, context = (each.astype(np.int64) for each in corners)
        visible = _covered(context, seen if attempt < _TRIES else grid, grid) & ~_covered(targets, target, grid)
        fewest = int(visible.sum(axis=(1, 2)).min())
        if fewest >= settings.min_context:
            break
    if not fewest:
        raise ValueError(f"step {step}: the targets of an image hide all of it; lower method.targets or target_scale")
    return Plan(target, targets, visible, fewest)


def _covered(corners: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """(rows, gh, gw) bool: which units lie in one of the blocks with these corners (rows, n, 2)."""
    inside = [
        (np.arange(side) >= corners[..., axis, None]) & (np.arange(side) < corners[..., axis, None] + size[axis])
        for axis, side in enumerate(grid)
    ]
    return np.einsum("r n h, r n w -> r h w", *inside, dtype=np.int64, casting="unsafe") > 0


def ijepa_masks(settings: IjepaConfig, grid: tuple[int, int], batch_size: int) -> DrawFields:
    """`drop_mask` (gh, gw) bool, what an image does not see, and `target_corners` (targets, 2) int64."""

    def draw(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        whole = plan(settings, grid, batch_size, seed, step)
        places = np.flatnonzero(whole.context[row])
        if settings.sampling == "fair":
            order = uniform_table(stream_keys(seed, Purpose.MASKS, step, np.array([row]), _CUT), len(places))[0]
            places = places[np.argsort(order, kind="stable")]
        hidden = np.ones(grid[0] * grid[1], dtype=np.bool_)
        hidden[places[: whole.count]] = False
        return {"drop_mask": hidden.reshape(grid), "target_corners": whole.corners[row]}

    return draw


def check_blocks(settings: IjepaConfig, grid: tuple[int, int]) -> None:
    """Raise ValueError where the targets could hide all of an image but too few units."""
    published = settings.sampling == "as_published"
    largest = max(
        math.prod(block_size(grid, settings.target_scale[1], aspect, published)) for aspect in settings.target_aspect
    )
    units = grid[0] * grid[1]
    left = units - settings.targets * largest
    if left < 1:
        raise ValueError(
            f"method.targets={settings.targets} blocks of up to {largest} of the image's {grid[0]}x{grid[1]} units may "
            "hide all of it; take fewer, a smaller method.target_scale, larger views.global_crops or smaller patches"
        )
    if settings.min_context > units - largest:
        raise ValueError(
            f"method.min_context is {settings.min_context} of {units} units, of which a target alone may have "
            f"{largest}; it may be {units - largest} at most"
        )
