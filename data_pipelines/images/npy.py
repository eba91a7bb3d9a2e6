"""NumPy's `.npy` files from bytes in memory: the header is matched word by word, never evaluated or unpickled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange

from data_pipelines.images.pixels import Header, UnusableImageError, check_size

_MAX_HEADER = 1024  # bytes; three entries take some 130
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([^']{1,20})',\s*'fortran_order':\s*(True|False),\s*"
    rb"'shape':\s*\(\s*((?:[0-9]{1,12}\s*,\s*)*(?:[0-9]{1,12})?)\s*\),?\s*\}\s*"
)

_LEVELS = frozenset(("|u1", "<u1", ">u1", "<u2", ">u2"))  # of images
_NUMBERS = _LEVELS | {f"{order}{kind}" for order in "<>" for kind in ("f2", "f4", "f8", "i2", "i4", "i8", "u4", "u8")}


class _Array(NamedTuple):
    dtype: np.dtype
    by_columns: bool  # Fortran's order
    shape: tuple[int, ...]
    start: int  # of the values, in bytes


def read_npy(content: bytes, channels: int | None) -> np.ndarray:
    """(h, w, c) uint8 or uint16 of an array (h, w), (h, w, c) or (c, h, w) of those types; of four axes, which are a
    stack (see `read_stack`), the first frame.

    The channels are the first or last axis, namely the one of `channels` entries. Where neither has as many, an axis
    of 1 will do for 3 channels and one of 3 for 1. `channels` None: the shorter of the two axes.

    Raises:
        ValueError: Of other types or axes, where both axes could be it, or not as long as its header says.
    """
    array = _header(content)
    values = _values(content, array)
    return _channels_last(values[0] if values.ndim == 4 else values, channels)


def read_stack(
    content: bytes, wanted: Callable[[int], Sequence[int]], channels: int | None
) -> tuple[list[int], dict[int, np.ndarray]] | None:
    """The frames that are `wanted` of an array (t, h, w), (t, h, w, c) or (t, c, h, w): their numbers, and each (h, w,
    c) as of `read_npy`. None where it is one image.

    Raises:
        ValueError: As `read_npy` does.
    """
    array = _header(content, stack=True)
    if len(array.shape) == 2 or array.shape[0] < 2:
        return None
    values = _values(content, array)
    numbers = list(wanted(len(values)))
    return numbers, {number: _channels_last(values[number], channels) for number in dict.fromkeys(numbers)}


def _values(content: bytes, array: _Array) -> np.ndarray:
    values = np.frombuffer(content, array.dtype, offset=array.start)
    return values.reshape(array.shape, order="F" if array.by_columns else "C")


def _channels_last(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    """(h, w, c) in native byte order of an image of two or three axes."""
    axis = channel_axis(pixels.shape, channels)
    if axis is None:
        raise UnusableImageError(
            "other_channels",
            f"an array of {_words(pixels.shape)} may be (h, w, c) as well as (c, h, w) with c = "
            f"{channels or pixels.shape[0]}; store it as TIFF",
        )
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.ndim == 2:
        return rearrange(pixels, "h w -> h w 1")
    return rearrange(pixels, "c h w -> h w c") if axis == 0 else pixels


def read_numbers(content: bytes) -> np.ndarray:
    """(h, w) of an array (h, w), (h, w, 1) or (1, h, w) of whole or real numbers of up to 8 bytes.

    Raises:
        ValueError: Of other types or axes, too large, or not as long as its header says.
    """
    array = _header(content, _NUMBERS)
    values = np.frombuffer(content, array.dtype, offset=array.start)
    values = values.reshape(array.shape, order="F" if array.by_columns else "C")
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[:, :, 0]
    if values.ndim != 2:
        reason = f"an npy of {_words(array.shape)}, and a value for each pixel is asked for: (h, w)"
        raise UnusableImageError("other_channels", reason)
    return values


def look_at_npy(content: bytes) -> Header:
    """What the header says; see `read_npy` for the errors. `channels` is None where the first axis is like the last."""
    array = _header(content)
    sides = list(array.shape)
    num_images = sides.pop(0) if len(sides) == 4 else 1
    axis = channel_axis(tuple(sides), None)
    channels: int | None = 1
    if len(sides) == 3:
        channels = sides.pop(axis or 0)
        channels = None if axis is None else channels
    mode = f"{_words(array.shape)} {array.dtype.newbyteorder('=')}"
    return Header("NPY", sides[1], sides[0], channels, 8 * array.dtype.itemsize, mode, num_images=num_images)


def _header(content: bytes, types: frozenset[str] = _LEVELS, stack: bool = False) -> _Array:
    """The header, checked against the limits of size and against the length of the file; of these types only.

    An array of four axes is a stack, and so is with `stack` one of three, of images of one channel.
    """
    if content[6:7] == b"\x01":
        first, length = 10, int.from_bytes(content[8:10], "little")
    elif content[6:7] in (b"\x02", b"\x03"):
        first, length = 12, int.from_bytes(content[8:12], "little")
    else:
        raise ValueError("no version of npy that there is")
    start = first + length
    text = content[first : first + min(length, _MAX_HEADER)]
    match = _HEADER.fullmatch(text)
    if match is None:
        raise ValueError("an npy header that is damaged, or of records or objects")
    name = match[1].decode("latin-1")
    if name not in types:
        raise UnusableImageError(
            "other_format",
            f"an npy of type {name!r}; images are uint8 or uint16: store other numbers scaled to one of those"
            if types is _LEVELS
            else f"an npy of type {name!r}; it holds whole or real numbers of up to 8 bytes",
        )
    dtype = np.dtype(name)
    shape = tuple(int(side) for side in match[3].replace(b",", b" ").split())
    if len(shape) not in (2, 3, 4):
        reason = f"an npy of {_words(shape)}; images are (h, w), (h, w, c) or (c, h, w), stacks those with t before"
        raise UnusableImageError("other_format", reason)
    image = shape[1:] if len(shape) == 4 or (stack and len(shape) == 3) else shape
    axis = channel_axis(image, None) if len(image) == 3 else None
    sides = [*image, 1] if len(image) == 2 else [*image[1:], image[0]] if axis == 0 else list(image)
    check_size(sides[0], sides[1], sides[2] * (shape[0] if image != shape else 1), dtype.itemsize)
    if len(content) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"an npy of {_words(shape)} has {math.prod(shape) * dtype.itemsize} bytes of values, and there are "
            f"{max(len(content) - start, 0)}"
        )
    return _Array(dtype, match[2] == b"True", shape, start)


def channel_axis(shape: tuple[int, ...], channels: int | None) -> int | None:
    """Which axis of (h, w), (h, w, c) or (c, h, w) the channels are, 0 or -1; None where it is not to be told.

    It is the one of `channels` entries; without such a number the shorter one. ValueError where neither axis fits.
    """
    if len(shape) == 2:
        return -1
    first, last = shape[0], shape[-1]
    if channels is None:
        return None if first == last else 0 if first < last else -1
    for wanted in (channels, {3: 1, 1: 3}.get(channels)):
        if wanted in (first, last):
            return None if first == last else 0 if first == wanted else -1
    reason = f"an npy of {_words(shape)}, and neither its first nor its last axis is data.channels, {channels}"
    raise UnusableImageError("other_channels", reason)


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "no axis"
