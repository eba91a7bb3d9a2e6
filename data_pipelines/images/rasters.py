"""Images beyond 8-bit RGB: TIFF, `.npy` arrays and PNG of 16 bits, with their channels and depth as stored."""

from __future__ import annotations

from data_pipelines.images.pixels import Header
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


def look(content: bytes) -> Header | None:
    """The header of one of these formats, or None for others; raises as `read` does."""
    if content[:4] in _TIFF:
        from data_pipelines.images.tiff import look_at_tiff

        return look_at_tiff(content)
    if content[:6] == _NPY:
        from data_pipelines.images.npy import look_at_npy

        return look_at_npy(content)
    return look_at_png(content) if is_deep_png(content) else None
