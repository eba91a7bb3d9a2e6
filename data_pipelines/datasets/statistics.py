"""Pixels in numbers: mean, deviation, range and percentiles of every channel, every image weighing the same.

The levels of 8 and 16 bits are counted, so that all of these are exact and come from one look at each image.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from data_pipelines.images.decode import DAMAGE, BadSampleError, decode_picture, look
from data_pipelines.images.issues import CASES, shown
from data_pipelines.images.pixels import Header
from data_pipelines.images.sample import Sample
from data_pipelines.images.stacks import decode_stack
from data_pipelines.images.tolerance import best_channels
from data_pipelines.rng import Purpose, random_bits, stream_key
from data_pipelines.transforms.frames import Frames

PERCENTILES = (1, 50, 99)
_PIECE = 16  # images counted together, whatever the number of threads: so sums are the same to the bit
_MAX_COUNTED = 1 << 24  # pixels: OpenCV counts in fp32, which is exact up to here
_MAX_MEMORY = 1 << 31  # bytes of counts under way
_log = logging.getLogger(__name__)
_MAX_NAMED = 10  # samples that cannot be decoded
_DIGITS = 8  # after the point; a level of 16 bits is 1.5e-5


class Kind(NamedTuple):
    """What the images of a data set are measured as."""

    channels: int
    bits: int


@dataclass(frozen=True)
class Statistics:
    """Of the pixels, per channel and in 0 .. 1 of the full range."""

    channels: int
    bits: int
    samples: int  # that were measured
    bad: int  # drawn, and not to be decoded so
    bad_samples: tuple[str, ...]  # the first few of those: key, shard and reason
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    percentiles: dict[str, tuple[float, ...]]

    def for_json(self) -> dict[str, Any]:
        """All but mean and std, which dataset.json has at its top."""
        values = dataclasses.asdict(self) | {
            "bad_samples": list(self.bad_samples),
            "min": list(self.min),
            "max": list(self.max),
            "percentiles": {name: list(found) for name, found in self.percentiles.items()},
        }
        return {name: value for name, value in values.items() if name not in ("mean", "std")}


def draw_samples(seed: int, num_samples: int, count: int) -> list[int]:
    """`count` different samples of a data set, all if it has no more, rising."""
    key = stream_key(seed, Purpose.STATISTICS)
    if num_samples <= 8 * count:  # enough of them to shuffle all
        return sorted(random_bits(key, num_samples).argsort(kind="stable")[:count].tolist())
    drawn = dict.fromkeys((random_bits(key, 2 * count) % np.uint64(num_samples)).tolist())
    return sorted(list(drawn)[:count])


def common_kind(headers: Iterable[Header]) -> tuple[Kind | None, str]:
    """As what images of these headers are measured: of the channels that all have, RGB where some are grey; of 16 bits
    if any is. None where they have no such number, or too many to be counted, and why, in words."""
    numbers: set[int | None] = set()
    bits = 8
    for header in headers:
        numbers.add(header.channels)
        bits = max(bits, header.bits)
    if None in numbers:
        return None, "some arrays do not tell which of their axes are the channels"
    counts = sorted(number for number in numbers if number is not None)
    if counts and 8 * counts[-1] << bits > _MAX_MEMORY:
        return None, f"the images have {counts[-1]:,} channels of {bits} bits, too many to count their levels"
    if counts and best_channels(dict.fromkeys(counts, 1))[1] == 0:
        return Kind(counts[-1], bits), ""
    return None, f"the images have {' or '.join(map(str, counts))} channels" if counts else "no image can be read"


def measure(
    read: Callable[[int], Sample],
    numbers: Sequence[int],
    kind: Kind,
    workers: int,
    advance: Callable[[int], object] = lambda count: None,
    frames: int = 1,
) -> Statistics:
    """Statistics of the samples of these numbers, the same to the bit for any number of workers.

    Args:
        read: A sample by its number; called by many threads.
        numbers: Which samples.
        kind: What the images are decoded as.
        workers: Threads.
        advance: Called with how many samples were done, by the caller's thread.
        frames: Of a stack; with several, samples are stacks, and those in the middle of as many parts count alike.

    Raises:
        ValueError: None of them can be decoded as `kind`; the first one's reason.
    """
    counted = np.zeros((kind.channels, 1 << kind.bits))
    samples, bad, noted = 0, [], Counter[str]()
    most = max(1, min(2 * workers, _MAX_MEMORY // counted.nbytes))
    pending: deque[Future[tuple[np.ndarray, int, list[BadSampleError], Counter[str]]]] = deque()
    pieces = iter([numbers[first : first + _PIECE] for first in range(0, len(numbers), _PIECE)])
    with ThreadPoolExecutor(min(workers, most), thread_name_prefix="statistics") as pool:
        while True:
            while len(pending) < most and (piece := next(pieces, None)) is not None:
                pending.append(pool.submit(_count_levels, read, piece, kind, frames))
            if not pending:
                break
            levels, good, refused, notes = pending.popleft().result()
            counted += levels
            samples += good
            bad += refused
            noted += notes
            advance(good + len(refused))
    if not samples:
        why = bad[0].reason if bad else "there is none"
        raise ValueError(
            f"none of {len(numbers)} images can be measured as {kind.channels} channels of {kind.bits} bits; the "
            f"first: {why}"
        )
    if noted["odd_opacity"]:
        _log.warning(
            "%d of %d images have %s. If it is a band, measure all with --channels %d and set data.channels so",
            noted["odd_opacity"],
            samples,
            CASES["odd_opacity"].found,
            kind.channels + 1,
        )
    return _summarise(counted / samples, kind, samples, bad)


def headers_of(read: Callable[[int], Sample], numbers: Iterable[int]) -> list[Header]:
    """Those of the samples that have one."""
    found = []
    for number in numbers:
        try:
            found.append(look(read(number).image))
        except DAMAGE:
            continue
    return found


def summarise_headers(headers: Sequence[Header]) -> dict[str, Any]:
    """How often each format and mode, and widths and heights in px: smallest, median, largest."""
    summary: dict[str, Any] = {
        "formats": dict(sorted(Counter(header.format for header in headers).items())),
        "modes": dict(sorted(Counter(header.mode for header in headers).items())),
    }
    for name in ("width", "height"):
        sides = sorted(getattr(header, name) for header in headers)
        summary[name] = [sides[0], sides[(len(sides) - 1) // 2], sides[-1]]
    return summary


def _count_levels(
    read: Callable[[int], Sample], numbers: Sequence[int], kind: Kind, frames: int
) -> tuple[np.ndarray, int, list[BadSampleError], Counter[str]]:
    """(channels, levels) the sum over images of each level's share of the pixels; how many images, the bad ones, and
    how often what was noted."""
    total = np.zeros((kind.channels, 1 << kind.bits))
    bad, noted = [], Counter[str]()
    for number in numbers:
        try:
            if frames == 1:
                pictures = [decode_picture(read(number), kind.channels, bits=kind.bits)]
            else:
                pictures = decode_stack(read(number), Frames(frames).chosen, kind.channels, bits=kind.bits)
        except BadSampleError as error:
            bad.append(error)
            continue
        noted.update({note for picture in pictures for note in picture.notes})
        for picture in pictures:
            _add_levels(total, picture.pixels, kind, 1 / len(pictures))
    return total, len(numbers) - len(bad), bad, noted


def _add_levels(total: np.ndarray, image: np.ndarray, kind: Kind, weight: float) -> None:
    """Add to `total` (channels, levels) each level's share of the pixels of an image (h, w, c), times `weight`."""
    height, width, _ = image.shape
    rows, size = max(1, _MAX_COUNTED // width), 1 << kind.bits
    for channel in range(kind.channels):
        plane = np.ascontiguousarray(image[:, :, channel])
        for top in range(0, height, rows):
            counts = cv2.calcHist([plane[top : top + rows]], [0], None, [size], [0, size])
            total[channel] += counts.ravel() / float(height * width) * weight


def _summarise(shares: np.ndarray, kind: Kind, samples: int, bad: Sequence[BadSampleError]) -> Statistics:
    """From each level's share of the pixels, (channels, levels)."""
    levels = np.arange(shares.shape[1]) / (shares.shape[1] - 1)
    mean = shares @ levels
    std = np.sqrt([share @ (levels - middle) ** 2 for share, middle in zip(shares, mean, strict=True)])
    there = shares > 0
    first = there.argmax(axis=1)
    last = shares.shape[1] - 1 - there[:, ::-1].argmax(axis=1)
    below = np.cumsum(shares, axis=1)
    percentiles = {
        str(percent): levels[(below >= percent / 100 * below[:, -1:]).argmax(axis=1)] for percent in PERCENTILES
    }
    return Statistics(
        channels=kind.channels,
        bits=kind.bits,
        samples=samples,
        bad=len(bad),
        bad_samples=tuple(
            f"{shown(error.key)} of {shown(error.shard.name)}: {error.reason}" for error in bad[:_MAX_NAMED]
        ),
        mean=_rounded(mean),
        std=_rounded(std),
        min=_rounded(levels[first]),
        max=_rounded(levels[last]),
        percentiles={name: _rounded(values) for name, values in percentiles.items()},
    )


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), _DIGITS) for value in values)
