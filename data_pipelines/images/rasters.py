"""Images beyond 8-bit RGB: TIFF, `.npy` arrays and PNG of 16 bits, with their channels and depth as stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.images.pixels import Header, UnusableImageError
from data_pipelines.images.png import is_deep_png, look_at_png, read_png
from data_pipelines.images.regions import Picture

#: How files begin whose readers are imported where there is one: most runs meet none.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"


def read(content: bytes, channels: int | None) -> Picture | None:
    """(h, w, c) uint8 or uint16 as stored, or None for what is none of these formats.

    `channels` settles what the file leaves open: which axis of an array they are, and whether opacity is one of
    them. Otherwise transparent pixels become black.

    Raises:
        ValueError: Damaged, too large, or of a kind that is not read.
    """
    if content[:4] in _TIFF:
        from data_pipelines.images.tiff import read_tiff

        return read_tiff(content, channels)
    if content[:6] == _NPY:
        from data_pipelines.images.npy import read_npy

        return Picture(read_npy(content, channels))
    return read_png(content, channels) if is_deep_png(content) else None


class Frames(NamedTuple):
    """Of a file that holds a stack."""

    numbers: list[int]  # of the frames that were asked for, in order
    by_number: dict[int, np.ndarray]  # (h, w, c) uint8 or uint16 as stored


def read_frames(content: bytes, wanted: Callable[[int], Sequence[int]], channels: int | None) -> Frames | None:
    """Of a TIFF or an array, the frames whose numbers `wanted` gives when it is told how many there are; None for what
    is one image, or of other formats. Raises as `read` does."""
    if content[:4] in _TIFF:
        from data_pipelines.images.tiff import read_pages

        frames = read_pages(content, wanted, channels)
    elif content[:6] == _NPY:
        from data_pipelines.images.npy import read_stack

        frames = read_stack(content, wanted, channels)
    else:
        return None
    sizes = set() if frames is None else {frame.shape[:2] for frame in frames[1].values()}
    if len(sizes) > 1:
        raise UnusableImageError("other_frames", f"frames of {len(sizes)} sizes; those of a stack are of one")
    return None if frames is None else Frames(*frames)


def look(content: bytes) -> Header | None:
    """The header of one of these formats, or None for others; raises as `read` does."""
    if content[:4] in _TIFF:
        from data_pipelines.images.tiff import look_at_tiff

        return look_at_tiff(content)
    if content[:6] == _NPY:
        from data_pipelines.images.npy import look_at_npy

        return look_at_npy(content)
    return look_at_png(content) if is_deep_png(content) else None
