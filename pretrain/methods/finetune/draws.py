"""What is drawn for the rows of a micro-batch, on the host: a function of (seed, step, row of the global batch) alone.

So neither the ranks, nor accumulation, nor a restart change what an image is mixed with or what is done to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipelines.rng import Purpose, Stream, stream_keys, uniform_table
from pretrain.methods.finetune.config import FinetuneConfig

#: The words after the step in the streams' keys.
MIX, ERASE, AUGMENT, NOISE = range(4)
_TRIES = 10  # at a box that fits, as timm's


class Mixes(NamedTuple):
    """How each row (b,) is mixed with its partner.

    share: (b,) float32, of the row's own pixels and label. boxes: (b, 4) int64, top, bottom, left and right of what is
    the partner's; empty where whole images are mixed, or nothing is. is_cut: (b,) bool.
    """

    share: np.ndarray
    boxes: np.ndarray
    is_cut: np.ndarray


def draw_mixes(config: FinetuneConfig, seed: int, step: int, rows: np.ndarray, size: tuple[int, int]) -> Mixes:
    """timm's `Mixup` (Zhang et al. 2018, Yun et al. 2019) of images of `size` (h, w): its choice between the two, its
    box and the share corrected to what is left of it."""
    drawn = [_mix(config, size, Stream(seed, Purpose.FINETUNE, step, MIX, place)) for place in _streams(config, rows)]
    share, boxes, is_cut = zip(*(drawn if len(drawn) == len(rows) else drawn * len(rows)), strict=True)
    return Mixes(np.array(share, dtype=np.float32), np.array(boxes, dtype=np.int64), np.array(is_cut))


def _streams(config: FinetuneConfig, rows: np.ndarray) -> list[int]:
    """A number for each draw: one for the whole batch, or one a row."""
    return [0] if config.mix_mode == "batch" else [1 + row for row in rows.tolist()]


def _mix(
    config: FinetuneConfig, size: tuple[int, int], stream: Stream
) -> tuple[float, tuple[int, int, int, int], bool]:
    nothing = (0, 0, 0, 0)
    if stream.random() >= config.mix_prob:
        return 1.0, nothing, False
    cuts = stream.random() < config.mix_switch_prob if config.mixup and config.cutmix else not config.mixup
    share = beta(stream, config.cutmix if cuts else config.mixup)
    if not cuts:
        return share, nothing, False
    return *box_of(share, size, stream), True


def box_of(share: float, size: tuple[int, int], stream: Stream) -> tuple[float, tuple[int, int, int, int]]:
    """A box (top, bottom, left, right) of about 1 - `share` of an image, its centre anywhere, and the true share."""
    height, width = size
    side = (1 - share) ** 0.5
    tall, wide = int(height * side), int(width * side)
    y, x = stream.integer(height), stream.integer(width)
    top, bottom = max(y - tall // 2, 0), min(y + (tall + 1) // 2, height)
    left, right = max(x - wide // 2, 0), min(x + (wide + 1) // 2, width)
    return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


def beta(stream: Stream, alpha: float) -> float:
    """The next number of the Beta distribution with both parameters `alpha` (Johnk 1964)."""
    while True:
        x, y = (stream.random() ** (1 / alpha) for _ in range(2))
        if 0 < x + y <= 1:
            return x / (x + y)


def draw_boxes(config: FinetuneConfig, seed: int, step: int, rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(b, 4) int64, the box (top, bottom, left, right) of each image that is erased, empty where none is: an area and
    a ratio of sides from .3 to 1/.3, both as timm's `RandomErasing` draws them, tried until the box fits."""
    height, width = size
    boxes = np.zeros((len(rows), 4), dtype=np.int64)
    draws = uniform_table(stream_keys(seed, Purpose.FINETUNE, step, ERASE, rows.astype(np.uint64)), 1 + 4 * _TRIES)
    low, high = config.erasing_area
    for place in np.flatnonzero(draws[:, 0] < config.erasing).tolist():
        for area, ratio, y, x in draws[place, 1:].reshape(_TRIES, 4):
            pixels = (low + (high - low) * area) * height * width
            aspect = float(np.exp((2 * ratio - 1) * np.log(1 / 0.3)))
            tall, wide = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
            if tall < height and wide < width:
                top, left = int(y * (height - tall + 1)), int(x * (width - wide + 1))
                boxes[place] = top, top + tall, left, left + wide
                break
    return boxes


def draw_uniform(what: int, count: int, seed: int, step: int, rows: np.ndarray) -> np.ndarray:
    """(b, count) float64 in [0, 1)."""
    return uniform_table(stream_keys(seed, Purpose.FINETUNE, step, what, rows.astype(np.uint64)), count)
