"""Common corruptions of images, five strengths each, to see what an encoder still makes of them.

The kinds and their strengths are those of ImageNet-C (Hendrycks and Dietterich 2019, "Benchmarking neural network
robustness to common corruptions and perturbations", appendix B), there chosen for sides of 224 px: lengths are given
here as shares of the shorter side, so that a strength hides as much of a small image as of a large one. Noise is of
each pixel whatever the size, and hurts small images more, as it does there. Glass blur, frost and snow are left out:
the first is elastic displacement once more, and the others need photographs of frost. Any number of channels and either
depth is taken; what ImageNet-C does by hue and saturation is done here by levels, which is the same for colours.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

STRENGTHS = (1, 2, 3, 4, 5)
_SIDE = 224.0  # px, to which the published lengths belong
_MOST_CHANNELS = 4  # that OpenCV moves at once
_SAMPLES = 8  # across a pixel, where a shape is drawn

Random = np.random.RandomState  # numpy has promised never to change what it draws
Corruption = Callable[[np.ndarray, int, Random], np.ndarray]  # (h, w, c) float32 in 0 .. 1, strength 0 .. 4


def corrupted(images: Tensor, samples: Tensor, name: str, strength: int, seed: int = 0) -> Tensor:
    """Images (b, c, h, w) of 8 or 16 bits with one of `CORRUPTIONS` at a strength of 1 .. 5, of the same kind.

    What is drawn depends on seed, corruption, strength and the image's number in `samples` (b,) alone. ValueError for
    another name or strength.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"there is no corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    if strength not in STRENGTHS:
        raise ValueError(f"strength is {strength}; it is one of {', '.join(map(str, STRENGTHS))}")
    largest = torch.iinfo(images.dtype).max
    made = np.empty(images.shape, dtype=np.uint8 if largest == 255 else np.uint16)
    for place, (image, sample) in enumerate(zip(images.numpy(), samples.tolist(), strict=True)):
        random = _random(seed, name, strength, sample)
        levels = rearrange(image, "c h w -> h w c").astype(np.float32) / largest
        changed = CORRUPTIONS[name](np.ascontiguousarray(levels), strength - 1, random)
        rounded = np.clip(changed, 0, 1) * largest + 0.5
        made[place] = rearrange(rounded, "h w c -> c h w").astype(made.dtype)
    return torch.from_numpy(made)


def rotated(images: Tensor, samples: Tensor, degrees: int, seed: int = 0) -> Tensor:
    """Images (b, c, h, w) turned about their middle: by a multiple of 90 exactly; else by so many degrees to the left
    or to the right, drawn for each, what lies outside mirrored in."""
    if degrees % 90 == 0:
        return torch.rot90(images, degrees // 90, dims=(2, 3)).contiguous()
    made = np.empty(images.shape, dtype=images.numpy().dtype)
    height, width = images.shape[2:]
    for place, (image, sample) in enumerate(zip(images.numpy(), samples.tolist(), strict=True)):
        side = 1 if _random(seed, "rotation", degrees, sample).random_sample() < 0.5 else -1
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), side * degrees, 1.0)
        turned = _moved(rearrange(image, "c h w -> h w c"), matrix)
        made[place] = rearrange(turned, "h w c -> c h w")
    return torch.from_numpy(made)


def gaussian_noise(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """As of a sensor in the dark."""
    return image + random.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[strength], image.shape)


def shot_noise(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Of few photons: their number is Poisson's."""
    photons = (60, 25, 12, 5, 3)[strength]
    return random.poisson(image * photons) / photons


def impulse_noise(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Levels that are lost: a share of them black, as many white."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[strength]
    drawn = random.random_sample(image.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn > 1 - share / 2, 1.0, image))


def defocus_blur(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Each point a disc."""
    radius = _length(image, (3, 4, 6, 8, 10)[strength])
    return cv2.filter2D(image, -1, _disc(radius), borderType=cv2.BORDER_REFLECT_101).reshape(image.shape)


def motion_blur(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Each point a line that fades, within 45 degrees of level."""
    length, fades = (_length(image, each) for each in ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[strength])
    kernel = _line(length, fades, math.radians(random.uniform(-45, 45)))
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101).reshape(image.shape)


def zoom_blur(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """The mean of the image and of its enlargements, as if the camera came nearer."""
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[strength]
    height, width = image.shape[:2]
    total = image.copy()
    factors = np.arange(1, end, step)
    for factor in factors:
        matrix = np.array([[factor, 0, (1 - factor) * (width - 1) / 2], [0, factor, (1 - factor) * (height - 1) / 2]])
        total += _moved(image, matrix)
    return total / (len(factors) + 1)


def fog(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Brighter by a cloud, and with less contrast by as much."""
    dense, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[strength]
    brightest = image.max()
    cloud = _cloud(max(image.shape[:2]), decay, random)[: image.shape[0], : image.shape[1], None]
    return (image + dense * cloud) * (brightest / (brightest + dense)) if brightest > 0 else image


def brightness(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """The brightest channel of each pixel raised, the others in proportion; black becomes grey."""
    added = (0.1, 0.2, 0.3, 0.4, 0.5)[strength]
    value = reduce(image, "h w c -> h w 1", "max")
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, image * (raised / np.maximum(value, 1e-6)), raised)


def contrast(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Levels drawn to their mean."""
    mean = reduce(image, "h w c -> 1 1 c", "mean")
    return (image - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[strength] + mean


def elastic(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Stretched at three corners, and each small region moved a little."""
    # corners, the regions' size and how far they are moved (standard deviation), as shares of the side
    corners, size, far = (
        (0.1, 0.7, 0.002), (0.2, 0.08, 0.0167), (0.02, 0.01, 0.0033), (0.02, 0.01, 0.0047), (0.02, 0.01, 0.008),
    )[strength]  # fmt: skip
    height, width = image.shape[:2]
    short = min(height, width)
    middle, third = np.array([width, height], np.float32) / 2, short / 3
    start = middle + np.array([[third, third], [third, -third], [-third, -third]], np.float32)
    end = start + random.uniform(-corners * short, corners * short, (3, 2)).astype(np.float32)
    stretched = _moved(image, cv2.getAffineTransform(start, end))
    sigma = size * short
    # of the mean of noise in a Gaussian window, 1 / (2 sqrt(pi) sigma) of its deviation is left
    gain = far * short * math.sqrt(3) * max(1.0, 2 * math.sqrt(math.pi) * sigma)
    shifts = [_smooth(random.uniform(-1, 1, (height, width)).astype(np.float32), sigma) * gain for _ in range(2)]
    rows, columns = np.indices((height, width), dtype=np.float32)
    from_x, from_y = columns + shifts[0], rows + shifts[1]

    def move(part: np.ndarray) -> np.ndarray:
        return cv2.remap(part, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    return _by_channels(stretched, move)


def pixelate(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Reduced, and enlarged by whole pixels."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[strength]
    height, width = image.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    reduced = _by_channels(image, lambda part: cv2.resize(part, small, interpolation=cv2.INTER_AREA))
    return _by_channels(reduced, lambda part: cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST))


def jpeg(image: np.ndarray, strength: int, random: Random) -> np.ndarray:
    """Compressed hard: three channels together, any others each as grey; of 16 bits 8 are kept."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, (25, 18, 15, 10, 7)[strength]]
    levels = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    parts = [levels[:, :, ::-1]] if levels.shape[2] == 3 else np.split(levels, levels.shape[2], axis=2)
    read = []
    for part in parts:
        encoded = cv2.imencode(".jpg", np.ascontiguousarray(part), quality)[1]
        opened = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)).reshape(part.shape)
        read.append(opened[:, :, ::-1] if part.shape[2] == 3 else opened)
    return np.concatenate(read, axis=2).astype(np.float32) / 255


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, motion_blur, zoom_blur, fog, brightness, contrast,
        elastic, pixelate, jpeg,
    )
}  # fmt: skip


def _random(seed: int, name: str, strength: int, sample: int) -> Random:
    words = [seed & 0xFFFFFFFF, zlib.crc32(name.encode()), strength, sample & 0xFFFFFFFF, sample >> 32]
    return np.random.RandomState(words)


def _length(image: np.ndarray, published: float) -> float:
    """A length in px of this image, of one that was published for images of 224 px."""
    return published * min(image.shape[:2]) / _SIDE


def _moved(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(h, w, c) by an affine map; what lies outside is mirrored in."""
    size = (image.shape[1], image.shape[0])

    def move(part: np.ndarray) -> np.ndarray:
        return cv2.warpAffine(part, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    return _by_channels(image, move)


def _by_channels(image: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """As many channels at once as OpenCV takes; it leaves out the axis of a single one."""
    parts: Sequence[np.ndarray] = [
        change(np.ascontiguousarray(image[:, :, first : first + _MOST_CHANNELS]))
        for first in range(0, image.shape[2], _MOST_CHANNELS)
    ]
    return np.concatenate([part if part.ndim == 3 else part[:, :, None] for part in parts], axis=2)


def _disc(radius: float) -> np.ndarray:
    """Weights (k, k) of how much of each pixel a disc covers."""
    reach = math.ceil(radius + 0.5)
    num = 2 * reach + 1
    fine = (np.arange(num * _SAMPLES) + 0.5) / _SAMPLES - num / 2
    inside = (fine[:, None] ** 2 + fine[None, :] ** 2 <= max(radius, 0.5) ** 2).astype(np.float32)
    kernel = reduce(inside, "(h a) (w b) -> h w", "mean", a=_SAMPLES, b=_SAMPLES)
    return kernel / kernel.sum()


def _line(length: float, fades: float, angle: float) -> np.ndarray:
    """Weights (k, k) along a line from the middle, as a Gaussian's of the deviation `fades`."""
    reach = math.ceil(length) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), dtype=np.float32)
    along = np.linspace(0, length, max(2, math.ceil(length * _SAMPLES)))
    weights = np.exp(-(along**2) / (2 * max(fades, 1e-3) ** 2))
    x, y = reach + along * math.cos(angle), reach + along * math.sin(angle)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for right, below in ((0, 0), (0, 1), (1, 0), (1, 1)):  # shared out among the four pixels around
        share = np.abs(1 - right - (x - left)) * np.abs(1 - below - (y - top))
        np.add.at(kernel, (top + below, left + right), weights * share)
    return kernel / kernel.sum()


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    reach = min(math.ceil(3 * sigma), 2 * max(values.shape))
    size = 2 * max(reach, 1) + 1
    return cv2.GaussianBlur(values, (size, size), max(sigma, 1e-3), borderType=cv2.BORDER_REFLECT)


def _cloud(side: int, decay: float, random: Random) -> np.ndarray:
    """(n, n) in 0 .. 1, n a power of two of `side` at least: a surface whose detail is weaker by `decay` at each
    halving (Fournier et al. 1982, by midpoints), the same on opposite edges."""
    surface, wobble = np.zeros((1, 1)), 1.0
    for _ in range(math.ceil(math.log2(max(side, 2)))):
        below, right = np.roll(surface, -1, 0), np.roll(surface, -1, 1)
        corners = surface + below + right + np.roll(below, -1, 1)
        size = surface.shape
        centres = corners / 4 + random.uniform(-wobble, wobble, size)
        level = surface + right + centres + np.roll(centres, 1, 0)
        upright = surface + below + centres + np.roll(centres, 1, 1)
        finer = np.empty((2 * size[0], 2 * size[1]))
        finer[::2, ::2], finer[1::2, 1::2] = surface, centres
        finer[::2, 1::2] = level / 4 + random.uniform(-wobble, wobble, size)
        finer[1::2, ::2] = upright / 4 + random.uniform(-wobble, wobble, size)
        surface, wobble = finer, wobble / decay
    surface -= surface.min()
    return surface / max(float(surface.max()), 1e-9)
