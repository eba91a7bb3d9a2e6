"""The PNG that thumbnails are stored as, without what takes Pillow three times as long as its pixels."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from data_pipelines.native import BUILT, kernel

_BEGIN = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_CHANNELS = {0: 1, 2: 3}  # by PNG's type of colour: grey, RGB
#: Chunks that change no pixel, and that nobody looks at.
_OF_NO_EFFECT = frozenset((b"IHDR", b"pHYs", b"gAMA", b"sRGB", b"cHRM", b"sBIT", b"bKGD", b"tIME"))


def read_plain_png(content: bytes, max_pixels: int) -> np.ndarray | None:
    """(h, w, c) uint8 of a sound PNG of 8 bits, grey or RGB and no more: the pixels that Pillow reads of it.

    None for all else, of which Pillow knows what it is, or what is wrong with it: a palette, opacity, a transparent
    colour, EXIF, text, animation or interlacing, a checksum that differs, too few pixels or too many.
    """
    if not BUILT or content[:16] != _BEGIN or len(content) < 57:
        return None
    width, height, bits, colour, *ways = struct.unpack_from(">IIBBBBB", content, 16)
    channels = _CHANNELS.get(colour)
    if channels is None or bits != 8 or any(ways) or not 0 < width * height <= max_pixels:
        return None
    packed = _pixel_data(content)
    if packed is None:
        return None
    size = height * (width * channels + 1)
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(packed, size + 1)
    except zlib.error:
        return None
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        return None
    pixels = np.empty((height, width, channels), dtype=np.uint8)
    return pixels if kernel.unfilter(raw, pixels) else None


def _pixel_data(content: bytes) -> bytes | memoryview | None:
    """That of all IDAT chunks, which follow each other; None where there are others than are known here, or damage."""
    view, place = memoryview(content), 8
    parts: list[memoryview] = []
    is_over = False  # the pixels, which nothing may interrupt
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(view[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        if end + 4 > len(content) or zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return None
        if kind == b"IEND":
            return None if not parts else parts[0] if len(parts) == 1 else b"".join(parts)
        if kind == b"IDAT" and not is_over:
            parts.append(view[place + 8 : end])
        elif kind in _OF_NO_EFFECT and (kind != b"IHDR" or place == 8):
            is_over = bool(parts)
        else:
            return None
        place = end + 4
    return None
