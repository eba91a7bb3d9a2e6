"""Colour on the device: the CPU cuts and resizes, the GPU jitters, greys, blurs and solarises whole batches.

Every operation is Pillow's in 8 bits, with its clamping and rounding, in each crop's own order, so that the pictures
are those of the backends on the CPU to a level here and there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from data_pipelines.transforms.backends.base import SOLARISE_THRESHOLD
from data_pipelines.transforms.backends.colours import BLUR, GREY, NUM_OPERATIONS, SOLARISE

if TYPE_CHECKING:
    from data_pipelines.buffers import Batch

_BLUR_PASSES = 3  # box blurs that make Pillow's Gaussian
_AT_ONCE = 256  # crops; bounds the memory of intermediate results


def finish(batch: Batch, drawn: Batch) -> Batch:
    """The batch with its colours applied.

    Args:
        batch: On the device.
        drawn: The same batch on the CPU; its `global_colours`, `local_colours` and `teacher_colours` are read, without
            waiting for the device.
    """
    finished = {name: part for name, part in batch.items() if not name.endswith("_colours")}
    colours = drawn["global_colours"]
    finished["global_crops"] = _per_view(batch["global_crops"], colours)
    if "local_crops" in batch:
        finished["local_crops"] = _per_view(batch["local_crops"], drawn["local_colours"])
    if "target_crops" in batch:
        finished["target_crops"] = apply_colours(batch["target_crops"], colours[:, 0])
    if "teacher_colours" in batch:
        finished["teacher_crops"] = _per_view(batch["teacher_crops"], drawn["teacher_colours"])
    return finished


def _per_view(crops: Tensor, colours: Tensor) -> Tensor:
    flat = apply_colours(rearrange(crops, "b v c h w -> (b v) c h w"), rearrange(colours, "b v p -> (b v) p"))
    return rearrange(flat, "(b v) c h w -> b v c h w", b=len(crops))


def apply_colours(crops: Tensor, colours: Tensor) -> Tensor:
    """Jitter, grey, blur and solarise each crop as its own row says.

    Args:
        crops: (n, c, h, w) uint8 on any device, of 3 channels or 1; left as they are.
        colours: (n, NUM_COLOURS) float32 on the CPU, by `colours.write_colours`.

    Returns:
        New crops, (n, c, h, w) uint8.
    """
    done = crops.clone(memory_format=torch.contiguous_format)
    for chunk, rows in zip(done.split(_AT_ONCE), colours.split(_AT_ONCE), strict=True):
        for place in range(NUM_OPERATIONS):
            for number, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
                _where(chunk, rows[:, place] == number, operation, rows[:, NUM_OPERATIONS + place])
        if crops.shape[1] == 3:
            _where(chunk, rows[:, GREY] > 0, _grey, rows[:, GREY])
        _where(chunk, rows[:, BLUR] > 0, _gaussian_blur, rows[:, BLUR])
        _where(chunk, rows[:, SOLARISE] > 0, _solarise, rows[:, SOLARISE])
    return done


def _where(crops: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> None:
    """Replace the chosen crops by the operation's result, each with its own value (on the CPU)."""
    index = chosen.nonzero()[:, 0]
    if len(index):
        values = values[index]
        index = index.to(crops.device, non_blocking=True)
        crops.index_copy_(0, index, operation(crops.index_select(0, index), values))


def _on(values: Tensor, crops: Tensor) -> Tensor:
    """(n,) on the CPU -> (n, 1, 1, 1) float32 on the crops' device."""
    return rearrange(values.float(), "n -> n 1 1 1").to(crops.device, non_blocking=True)


def _blend(degenerate: Tensor | float, crops: Tensor, factors: Tensor) -> Tensor:
    """Pillow's `Image.blend`: cut off, not rounded."""
    mixed = degenerate + _on(factors, crops) * (crops.float() - degenerate)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _luma(crops: Tensor) -> Tensor:
    """Pillow's conversion to L: (n, 1, h, w) int32."""
    if crops.shape[1] == 1:
        return crops.int()
    red, green, blue = crops.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _brightness(crops: Tensor, factors: Tensor) -> Tensor:
    return _blend(0.0, crops, factors)


def _contrast(crops: Tensor, factors: Tensor) -> Tensor:
    luma = _luma(crops)
    mean = luma.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64).double() / luma[0].numel()
    return _blend((mean + 0.5).floor().float(), crops, factors)


def _saturation(crops: Tensor, factors: Tensor) -> Tensor:
    return _blend(_luma(crops).float(), crops, factors)


def _grey(crops: Tensor, _: Tensor) -> Tensor:
    return _luma(crops).to(torch.uint8).expand_as(crops)


def _solarise(crops: Tensor, _: Tensor) -> Tensor:
    return torch.where(crops < SOLARISE_THRESHOLD, crops, 255 - crops)


def _hue(crops: Tensor, shifts: Tensor) -> Tensor:
    """To 8-bit HSV and back as Pillow does, the hue turned by `shifts` levels in between."""
    red, green, blue = crops.float().unbind(dim=1)
    value, lowest = crops.amax(dim=1).float(), crops.amin(dim=1).float()
    chroma = value - lowest
    safe = chroma.clamp(min=1)
    from_red, from_green, from_blue = (value - red) / safe, (value - green) / safe, (value - blue) / safe
    sixths = torch.where(
        red == value,
        from_blue - from_green,
        torch.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red),
    )
    hue = ((sixths / 6 + 1).remainder(1) * 255).floor()
    hue = torch.where(chroma > 0, hue, torch.zeros_like(hue))
    hue = (hue + _on(shifts, crops)[:, 0]).remainder(256)
    saturation = (chroma * 255 / value.clamp(min=1)).floor() / 255
    sixths = hue * (6 / 255)
    sector = sixths.floor()
    part = sixths - sector
    low = (value * (1 - saturation)).add_(0.5).floor_()
    falling = (value * (1 - saturation * part)).add_(0.5).floor_()
    rising = (value * (1 - saturation * (1 - part))).add_(0.5).floor_()
    levels = torch.stack([value, falling, low, low, rising, value], dim=1)  # red's, by sector
    sector = sector.long().remainder(6)
    # green and blue are red's two and four sectors earlier
    pick = torch.stack([sector, (sector + 4) % 6, (sector + 2) % 6], dim=1)
    return levels.gather(1, pick).clamp_(0, 255).to(torch.uint8)


def _gaussian_blur(crops: Tensor, radii: Tensor) -> Tensor:
    """Pillow's `GaussianBlur`: three box blurs of fractional width along rows, then along columns, in 8 bits."""
    widths = [_box_radius(float(radius)) for radius in radii]
    reach = max(math.floor(width) for width in widths) + 1
    taps = torch.zeros(len(widths), reach + 1, dtype=torch.float64)  # a box's weights from its centre outwards
    for row, width in zip(taps, widths, strict=True):
        whole = math.floor(width)
        unit = int(np.float32(2**24) / (width * np.float32(2) + np.float32(1)))
        row[: whole + 1] = unit / 2**24
        row[whole + 1] = (2**24 - (2 * whole + 1) * unit) // 2 / 2**24
    taps = taps.to(crops.device, non_blocking=True)
    blurred = crops.double()  # single precision would round ties of 8 bits otherwise, and there are many
    for axis in (3, 2):
        length = crops.shape[axis]
        for _ in range(_BLUR_PASSES):
            wide = pad(blurred, (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach), mode="replicate")
            blurred = _tap(taps, 0) * blurred
            for distance in range(1, reach + 1):
                both = wide.narrow(axis, reach - distance, length) + wide.narrow(axis, reach + distance, length)
                blurred += _tap(taps, distance) * both
            blurred = (blurred + 0.5).floor_().clamp_(0, 255)
    return blurred.to(torch.uint8)


def _tap(taps: Tensor, distance: int) -> Tensor:
    return rearrange(taps[:, distance], "n -> n 1 1 1")


def _box_radius(sigma: float) -> np.float32:
    """The box whose three passes have a Gaussian's variance (Gwosdek et al. 2011), in Pillow's single precision."""
    one, two = np.float32(1), np.float32(2)
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(_BLUR_PASSES)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    edge = (two * whole + one) * (whole * (whole + one) - np.float32(3) * variance)
    return whole + edge / (np.float32(6) * (variance - (whole + one) * (whole + one)))
