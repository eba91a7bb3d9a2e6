"""The parameters of one image's crops, drawn as the recipes' authors draw them.

Drawing is apart from executing, so that every backend of the same parameters shows the same picture.
"""

from __future__ import annotations

from math import exp, log, sqrt
from typing import NamedTuple, Protocol

from data_pipelines.rng import Stream
from data_pipelines.transforms import native_shape
from data_pipelines.transforms.config import Crop, Views

#: The four operations of colour jitter, in the order of `Crop.jitter`.
JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_NO_JITTER = (0, 0, 0, 0)
_TRIES = 10


class Uniform(Protocol):
    """What a draw needs of a generator: `Stream`, `random.Random` and NumPy's all have it."""

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""


class CropParams(NamedTuple):
    """What happens to one crop, in this order.

    `jitter` names the operations in their drawn order with the factor of each; hue's is a shift in turns.
    """

    box: tuple[float, float, float, float]  # left, top, right, bottom in px of the image
    flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
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
    if views.native:
        return draw_shaped(views, identity, image_size)[0]
    return _drawn(views, identity, image_size)


def draw_shaped(
    views: Views, identity: tuple[int, ...], image_size: tuple[int, int]
) -> tuple[tuple[CropParams, ...], tuple[tuple[int, int], ...]]:
    """What `draw` gives of crops that keep their own shape, and the rows and columns of patches of each."""
    drawn = _drawn(views, identity, image_size)
    tokens = native_shape.tokens_of(views, *native_shape.words(identity)).tolist()
    sides = [(bottom - top, right - left) for left, top, right, bottom in (params.box for params in drawn)]
    grids = tuple(native_shape.grid_of(*side, count) for side, count in zip(sides, tokens, strict=True))
    pairs = zip(drawn, grids, strict=True)
    return tuple(params._replace(box=native_shape.trimmed(params.box, grid)) for params, grid in pairs), grids


def _drawn(views: Views, identity: tuple[int, ...], image_size: tuple[int, int]) -> tuple[CropParams, ...]:
    crops: list[Crop] = list(views.global_crops)
    if views.local_crops is not None:
        crops += [views.local_crops] * views.local_crops.count
    return tuple(draw_crop(crop, Stream(*identity, view), image_size) for view, crop in enumerate(crops))


def draw_crop(crop: Crop, rng: Uniform, image_size: tuple[int, int]) -> CropParams:
    """Parameters of one crop of an image of (height, width) px; DINO's order of operations (Caron et al. 2021)."""
    random = rng.random  # loaders run this with the interpreter's lock held, so it is written to be quick
    ratio = crop.ratio
    if crop.shape == "native":
        own = image_size[1] / image_size[0]
        ratio = (ratio[0] * own, ratio[1] * own)
    box = random_resized_box(rng, image_size, crop.scale, ratio)
    flip = random() < crop.flip
    jitter: tuple[tuple[str, float], ...] = ()
    if crop.jitter != _NO_JITTER and random() < crop.jitter_prob:
        jitter = _draw_jitter(rng, crop.jitter)
    grayscale = crop.grayscale > 0 and random() < crop.grayscale
    blur_radius = None
    if crop.blur > 0 and random() < crop.blur:
        low, high = crop.blur_radius
        blur_radius = low + (high - low) * random()
    solarise = crop.solarise > 0 and random() < crop.solarise
    return CropParams(box, flip, jitter, grayscale, blur_radius, solarise)


def random_resized_box(
    rng: Uniform, image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of torchvision's `RandomResizedCrop`.

    Ten tries at an area uniform in `scale` and a ratio log-uniform in `ratio`; if none fits into the
    image, the largest centred box whose ratio is permitted.
    """
    height, width = image_size
    (low, high), log_low, log_high = scale, log(ratio[0]), log(ratio[1])
    box = getattr(rng, "box", None)  # the same in C
    found = box(height, width, low, high, log_low, log_high, _TRIES) if box else None
    if found is not None:
        return found  # type: ignore[no-any-return]
    random, area = rng.random, height * width
    for _ in range(0 if box else _TRIES):
        target = area * (low + (high - low) * random())
        aspect = exp(log_low + (log_high - log_low) * random())
        w, h = round(sqrt(target * aspect)), round(sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(random() * (height - h + 1))
            left = int(random() * (width - w + 1))
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
    random = rng.random
    order = [0, 1, 2, 3]
    for last in (3, 2, 1):  # Fisher-Yates
        other = int(random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    operations = []
    for index in order:
        strength = strengths[index]
        if strength:
            name = JITTER_OPERATIONS[index]
            low, high = (-strength, strength) if name == "hue" else (1 - strength, 1 + strength)
            operations.append((name, low + (high - low) * random()))
    return tuple(operations)
