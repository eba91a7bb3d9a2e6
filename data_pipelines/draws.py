"""The parameters of one image's crops, drawn as the recipes' authors draw them.

Drawing is apart from executing, so that every executor of the same parameters shows the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipelines.streams import ReadyStream, Stream, ready_streams
from data_pipelines.views import Crop, Views

#: The four operations of colour jitter, in the order of `Crop.jitter`.
JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_TRIES = 10
_READY = 20  # random numbers of a crop made at once; few crops need more


class Uniform(Protocol):
    """What a draw needs of a generator: `Stream`, `random.Random` and NumPy's all have it."""

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""


@dataclass(frozen=True, slots=True)
class CropParams:
    """What happens to one crop, in this order.

    `jitter` names the operations in their drawn order with the factor of each; hue's is a shift in turns.
    """

    box: tuple[float, float, float, float]  # left, top, right, bottom in px of the image
    flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    grey: bool = False
    blur_radius: float | None = None  # px of the finished crop
    solarise: bool = False


def draw(views: Views, identity: tuple[int, ...], image_size: tuple[int, int]) -> tuple[CropParams, ...]:
    """Parameters of the global crops, then of the local ones, of one image.

    Args:
        views: What the recipe asks for.
        identity: Integers that name the image's showing: (seed, data set, epoch, sample). Every view has its
            own stream of random numbers, so a recipe with more views draws the same for those they share.
        image_size: Height and width in pixels.
    """
    crops = crops_of(views)
    return tuple(draw_crop(crop, Stream(*identity, view), image_size) for view, crop in enumerate(crops))


class Draws:
    """The draws of several showings, whose random numbers are made together: the same as `draw`'s, in half the time.

    Args:
        views: As of `draw`.
        identities: The showings.
    """

    def __init__(self, views: Views, identities: Sequence[tuple[int, ...]]) -> None:
        self._crops = crops_of(views)
        self._streams = ready_streams(identities, len(self._crops), _READY)

    def draw(self, showing: int, image_size: tuple[int, int]) -> tuple[CropParams, ...]:
        """Parameters for the showing of that place among the identities; as often as asked for, the same."""
        return tuple(
            [
                draw_crop(crop, ReadyStream(*stream), image_size)
                for crop, stream in zip(self._crops, self._streams[showing], strict=True)
            ]
        )


def crops_of(views: Views) -> list[Crop]:
    """One `Crop` for each view: the global ones, then the local ones."""
    local = views.local_crops
    return [*views.global_crops, *([local] * local.count if local is not None else [])]


def draw_crop(crop: Crop, rng: Uniform, image_size: tuple[int, int]) -> CropParams:
    """Parameters of one crop of an image of (height, width) px; DINO's order of operations (Caron et al. 2021)."""
    box = random_resized_box(rng, image_size, crop.scale, crop.ratio)
    flip = rng.random() < crop.flip
    jitter: tuple[tuple[str, float], ...] = ()
    if any(crop.jitter) and rng.random() < crop.jitter_prob:
        jitter = _draw_jitter(rng, crop.jitter)
    grey = crop.grey > 0 and rng.random() < crop.grey
    blur_radius = _uniform(rng, *crop.blur_radius) if crop.blur > 0 and rng.random() < crop.blur else None
    solarise = crop.solarise > 0 and rng.random() < crop.solarise
    return CropParams(box, flip, jitter, grey, blur_radius, solarise)


def random_resized_box(
    rng: Uniform, image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of torchvision's `RandomResizedCrop`.

    Ten tries at an area uniform in `scale` and a ratio log-uniform in `ratio`; if none fits into the
    image, the largest centred box whose ratio is permitted.
    """
    height, width = image_size
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        target = area * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, log_low, log_high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.random() * (height - h + 1))
            left = int(rng.random() * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _draw_jitter(rng: Uniform, strengths: tuple[float, float, float, float]) -> tuple[tuple[str, float], ...]:
    """torchvision's `ColorJitter`: factors uniform around 1 (hue: around 0), in an order drawn uniformly."""
    order = list(range(len(JITTER_OPERATIONS)))
    for last in range(len(order) - 1, 0, -1):  # Fisher-Yates
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    operations = []
    for index in order:
        name, strength = JITTER_OPERATIONS[index], strengths[index]
        if strength:
            low, high = (-strength, strength) if name == "hue" else (1 - strength, 1 + strength)
            operations.append((name, _uniform(rng, low, high)))
    return tuple(operations)


def _uniform(rng: Uniform, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
