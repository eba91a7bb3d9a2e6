"""RandAugment (Cubuk et al. 2020) on batches on the device: the images that draw an op go through it together.

Strengths are timm's (`rand-m9-mstd0.5-inc1` and others); shapes are resampled bilinearly, filled with the data's mean.
Which op, how strong and whether it is done is drawn on the host, so nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pretrain.methods.finetune.config import RandAugmentConfig
from pretrain.methods.finetune.draws import AUGMENT, draw_uniform
from pretrain.stream.from_host import from_host

_GREY = (0.299, 0.587, 0.114)


class Ops(NamedTuple):
    """What is done to each image (b,), layer by layer: the place of the op in `OPS`, -1 for none, and its value."""

    ops: np.ndarray  # (b, layers) int64
    values: np.ndarray  # (b, layers) float64


def draw_ops(config: RandAugmentConfig, seed: int, step: int, rows: np.ndarray) -> Ops:
    """The ops of the rows (b,) of a global batch, with replacement as timm draws them."""
    draws = rearrange(draw_uniform(AUGMENT, 5 * config.ops, seed, step, rows), "b (l d) -> d b l", d=5)
    which, done, radius, angle, sign = draws
    ops = np.where(done < config.prob, (which * len(OPS)).astype(np.int64), -1)
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)  # Box and Muller
    level = (config.magnitude + config.magnitude_std * normal).clip(0, 10) / 10
    signed = np.where(sign < 0.5, -level, level)
    values = np.zeros_like(level)
    for place, op in enumerate(OPS):
        values = np.where(ops == place, op.value(level, signed, config.increasing), values)
    return Ops(ops, values)


def augment(images: Tensor, drawn: Ops, fill: Tensor) -> Tensor:
    """Images (b, 3, h, w) uint8 after their ops, float of whole numbers in 0 .. 255.

    fill: (3,) in 0 .. 255, of what comes into view.
    """
    images = images.float()
    for layer in range(drawn.ops.shape[1]):
        for place, op in enumerate(OPS):
            chosen = np.flatnonzero(drawn.ops[:, layer] == place)
            if not len(chosen):
                continue
            values = from_host(drawn.values[chosen, layer].astype(np.float32), images.device)
            where = from_host(chosen, images.device)
            changed = op.change(images.index_select(0, where), rearrange(values, "k -> k 1 1 1"), fill)
            images = images.index_copy(0, where, changed.round().clamp(0, 255))
    return images


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    return (other + (images - other) * factors).clamp(0, 255)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return rearrange((red * _GREY[0] + green * _GREY[1] + blue * _GREY[2]).floor(), "b h w -> b 1 h w")


def autocontrast(images: Tensor, values: Tensor, fill: Tensor) -> Tensor:
    """Each channel stretched to 0 .. 255; one of a single level is left."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    return (images - torch.where(flat, 0.0, low)) * torch.where(flat, 1.0, 255 / (high - low).clamp_min(1))


def equalise(images: Tensor, values: Tensor, fill: Tensor) -> Tensor:
    """Each channel with its levels spread evenly, by Pillow's rule."""
    height, width = images.shape[2:]
    levels = rearrange(images, "b c h w -> (b c) (h w)").long()
    counts = torch.zeros(len(levels), 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    step = (height * width - counts.gather(1, levels.amax(dim=1, keepdim=True))) // 255
    before = counts.cumsum(dim=1) - counts
    table = ((before + step // 2) // step.clamp_min(1)).clamp(0, 255)
    found = torch.where(step > 0, table.gather(1, levels), levels)
    return rearrange(found, "(b c) (h w) -> b c h w", c=images.shape[1], h=height).to(images.dtype)


def invert(images: Tensor, values: Tensor, fill: Tensor) -> Tensor:
    """255 less each level."""
    return 255 - images


def posterise(images: Tensor, bits: Tensor, fill: Tensor) -> Tensor:
    """Only the highest so many of the 8 bits."""
    unit = 2 ** (8 - bits)
    return (images / unit).floor() * unit


def solarise(images: Tensor, threshold: Tensor, fill: Tensor) -> Tensor:
    """What is as bright as the threshold is inverted."""
    return torch.where(images >= threshold, 255 - images, images)


def solarise_add(images: Tensor, added: Tensor, fill: Tensor) -> Tensor:
    """What is darker than 128 becomes brighter."""
    return torch.where(images < 128, (images + added).clamp_max(255), images)


def colour(images: Tensor, factors: Tensor, fill: Tensor) -> Tensor:
    """Between grey (0) and twice as colourful (2)."""
    return _blend(images, _grey(images), factors)


def contrast(images: Tensor, factors: Tensor, fill: Tensor) -> Tensor:
    """Between its mean grey (0) and twice the contrast (2)."""
    return _blend(images, _grey(images).mean(dim=(2, 3), keepdim=True), factors)


def brightness(images: Tensor, factors: Tensor, fill: Tensor) -> Tensor:
    """Between black (0) and twice as bright (2)."""
    return (images * factors).clamp(0, 255)


def sharpness(images: Tensor, factors: Tensor, fill: Tensor) -> Tensor:
    """Between smooth (0) and twice as sharp (2); the outermost pixels stay."""
    if min(images.shape[2:]) <= 2:
        return images
    kernel = images.new_ones(images.shape[1], 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=images.shape[1]).round()
    return _blend(images, smooth, factors)


def _warp(images: Tensor, rows: list[Tensor | float], fill: Tensor) -> Tensor:
    """Each output pixel (x, y), counted in px from the middle, shows what lies at (ax + by + c, dx + ey + f)."""
    height, width = images.shape[2:]
    some = next(value for value in rows if isinstance(value, Tensor)).flatten()
    a, b, c, d, e, f = (
        value.flatten() if isinstance(value, Tensor) else torch.full_like(some, value) for value in rows
    )
    # affine_grid counts from -1 to 1 on both axes
    scaled = torch.stack([a, b * height / width, c * 2 / width, d * width / height, e, f * 2 / height], dim=1)
    grid = F.affine_grid(rearrange(scaled, "k (r c) -> k r c", r=2), list(images.shape), align_corners=False)
    offset = rearrange(fill, "c -> 1 c 1 1")
    return F.grid_sample(images - offset, grid, "bilinear", "zeros", align_corners=False) + offset


def rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Turned about the middle, counterclockwise."""
    turn = degrees * (math.pi / 180)
    return _warp(images, [turn.cos(), -turn.sin(), 0.0, turn.sin(), turn.cos(), 0.0], fill)


def shear_x(images: Tensor, factors: Tensor, fill: Tensor) -> Tensor:
    """Rows moved the further the lower they are, the first not at all."""
    return _warp(images, [1.0, factors, factors * images.shape[2] / 2, 0.0, 1.0, 0.0], fill)


def shear_y(images: Tensor, factors: Tensor, fill: Tensor) -> Tensor:
    """Columns moved the further the more to the right they are, the first not at all."""
    return _warp(images, [1.0, 0.0, 0.0, factors, 1.0, factors * images.shape[3] / 2], fill)


def translate_x(images: Tensor, shares: Tensor, fill: Tensor) -> Tensor:
    """Moved by a share of the width."""
    return _warp(images, [1.0, 0.0, shares * images.shape[3], 0.0, 1.0, 0.0], fill)


def translate_y(images: Tensor, shares: Tensor, fill: Tensor) -> Tensor:
    """Moved by a share of the height."""
    return _warp(images, [1.0, 0.0, 0.0, 0.0, 1.0, shares * images.shape[2]], fill)


class Op(NamedTuple):
    """change: from images (k, 3, h, w) in 0 .. 255, values (k, 1, 1, 1) and the fill to images. value: from the
    level in 0 .. 1, the level with a sign, and whether the strength is to rise with it, to the value."""

    change: Callable[[Tensor, Tensor, Tensor], Tensor]
    value: Callable[[np.ndarray, np.ndarray, bool], np.ndarray]


def _nothing(level: np.ndarray, signed: np.ndarray, increasing: bool) -> np.ndarray:
    return np.zeros_like(level)


def _enhanced(level: np.ndarray, signed: np.ndarray, increasing: bool) -> np.ndarray:
    return (1 + 0.9 * signed).clip(min=0.1) if increasing else 1.8 * level + 0.1


def _bits(level: np.ndarray, signed: np.ndarray, increasing: bool) -> np.ndarray:
    return 4 - np.floor(4 * level) if increasing else np.floor(4 * level)


def _threshold(level: np.ndarray, signed: np.ndarray, increasing: bool) -> np.ndarray:
    return 256 - np.floor(256 * level) if increasing else np.floor(256 * level)


#: In timm's order; the strengths are those of its `_RAND_TRANSFORMS` and `_RAND_INCREASING_TRANSFORMS`.
OPS = (
    Op(autocontrast, _nothing),
    Op(equalise, _nothing),
    Op(invert, _nothing),
    Op(rotate, lambda level, signed, increasing: 30 * signed),
    Op(posterise, _bits),
    Op(solarise, _threshold),
    Op(solarise_add, lambda level, signed, increasing: np.floor(110 * level)),
    Op(colour, _enhanced),
    Op(contrast, _enhanced),
    Op(brightness, _enhanced),
    Op(sharpness, _enhanced),
    Op(shear_x, lambda level, signed, increasing: 0.3 * signed),
    Op(shear_y, lambda level, signed, increasing: 0.3 * signed),
    Op(translate_x, lambda level, signed, increasing: 0.45 * signed),
    Op(translate_y, lambda level, signed, increasing: 0.45 * signed),
)
