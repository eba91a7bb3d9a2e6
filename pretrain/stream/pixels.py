"""Between crops of integers, the floats that a network takes, and pictures that a person looks at."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor


def full_range(crops: Tensor) -> int:
    """The level of white: 255 or 65,535; floats are taken for levels of 8 bits."""
    return 255 if crops.is_floating_point() else torch.iinfo(crops.dtype).max


def unit_range(crops: Tensor) -> Tensor:
    """uint8 or uint16 pixels as floats in 0 .. 1."""
    return crops.float() / full_range(crops)


def normalised(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(..., c, h, w) uint8 or uint16 less the `mean` (c,), by the `std` (c,), both of pixels in 0 .. 1; of stacks (...,
    t * c, h, w) every frame."""
    full, frames = full_range(crops), crops.shape[-3] // len(mean)
    shift, scale = (repeat(values * full, "c -> (t c) 1 1", t=frames) for values in (mean, std))
    return (crops.float() - shift) / scale


def pictures(images: Tensor, like: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images (b, c, h, w) as uint8 to look at.

    Where the crops that they are `like` are 8-bit grey or RGB, the pixels that they stand for, clamped. Others would
    be all but black on a screen, as 12 bits of 16 are, so there each channel's mean is middle grey, and two deviations
    lead to black and white.
    """
    if is_plain(like):
        unit = images.float() * rearrange(std, "c -> c 1 1") + rearrange(mean, "c -> c 1 1")
    else:
        unit = images.float() / 4 + 0.5
    return (unit * 255).round().clamp(0, 255).to(torch.uint8)


def strip(images: Tensor, channels: int) -> Tensor:
    """The frames of stacks (..., t * c, h, w) beside each other, (..., c, h, t * w); images as they are."""
    if images.shape[-3] == channels:
        return images
    return rearrange(images, "... (t c) h w -> ... c h (t w)", c=channels)


def is_plain(crops: Tensor) -> bool:
    """Whether crops (..., c, h, w) are 8-bit grey or RGB, which a screen shows as they are."""
    return crops.dtype == torch.uint8 and crops.shape[-3] in (1, 3)
