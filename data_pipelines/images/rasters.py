"""Images beyond 8-bit RGB: TIFF, `.npy` arrays and PNG of 16 bits, with their channels and depth as stored."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
from PIL import Image

from data_pipelines.images.npy import MAGIC, look_at_npy, read_npy
from data_pipelines.images.pixels import Header, UnusableImageError, check_size, over_black, turned
from data_pipelines.images.tiff import MAGICS, look_at_tiff, read_tiff

_PNG = b"\x89PNG\r\n\x1a\n"
_NEEDED_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_MAX_PNG_SIDE = 1_000_000  # px, libpng's
_ORIENTATION = 0x0112
#: By PNG's type of colour: channels without opacity, whether there is opacity, and Pillow's name for the mode.
_COLOURS = {0: (1, False, "L;16"), 2: (3, False, "RGB;16"), 4: (1, True, "LA;16"), 6: (3, True, "RGBA;16")}


def read(content: bytes, channels: int | None) -> np.ndarray | None:
    """(h, w, c) uint8 or uint16 as stored, or None for what is none of these formats.

    `channels` settles what the file leaves open: which axis of an array they are, and whether opacity is one of
    them. Otherwise transparent pixels become black.

    Raises:
        ValueError: Damaged, too large, or of a kind that is not read.
    """
    if content[:4] in MAGICS:
        return read_tiff(content, channels)
    if content[:6] == MAGIC:
        return read_npy(content, channels)
    return _read_png(content, channels) if _is_deep_png(content) else None


def look(content: bytes) -> Header | None:
    """The header of one of these formats, or None for others; raises as `read` does."""
    if content[:4] in MAGICS:
        return look_at_tiff(content)
    if content[:6] == MAGIC:
        return look_at_npy(content)
    if not _is_deep_png(content):
        return None
    width, height = struct.unpack_from(">II", content, 16)
    channels, _, mode = _colours(content)
    return Header("PNG", width, height, channels, 16, mode)


def _is_deep_png(content: bytes) -> bool:
    return content[:8] == _PNG and content[12:16] == b"IHDR" and content[24:25] == b"\x10"


def _colours(content: bytes) -> tuple[int, bool, str]:
    colours = _COLOURS.get(content[25]) if len(content) > 25 else None
    if colours is None:
        raise ValueError("a damaged PNG: no such type of colour")
    return colours


def _read_png(content: bytes, channels: int | None) -> np.ndarray:
    """OpenCV's, for Pillow has no mode of several 16-bit channels."""
    width, height = struct.unpack_from(">II", content, 16)
    colours, _, _ = _colours(content)
    check_size(height, width, 4, 2)
    if max(height, width) > _MAX_PNG_SIDE:
        raise UnusableImageError("too_large", f"{width}x{height} pixels; a PNG of 16 bits has a million to a side")
    needed, orientation = _check_chunks(content)
    pixels = cv2.imdecode(np.frombuffer(needed, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != (height, width):
        raise ValueError("a damaged PNG: its pixels cannot be decoded")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    else:  # OpenCV's order is blue, green, red, and grey with opacity comes as four
        pixels = pixels[:, :, {3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]]
        if colours == 1:
            pixels = pixels[:, :, [0, 3]]
    if pixels.shape[2] in (2, 4) and pixels.shape[2] != channels:
        pixels = over_black(pixels)
    return turned(pixels, orientation)


def _check_chunks(content: bytes) -> tuple[bytes, int]:
    """Walk the chunks of a PNG to its end and compare their checksums: the file with only those chunks that its pixels
    need, and the orientation that its EXIF tells.

    libpng would do the same, but tells of damage and of odd colour profiles on the standard error of the whole process.
    """
    place, orientation = 8, 1
    needed: list[bytes | memoryview] = [_PNG]
    view = memoryview(content)
    while True:
        if place + 12 > len(content):
            raise ValueError("a truncated PNG")
        (length,) = struct.unpack_from(">I", content, place)
        end = place + 12 + length
        if end > len(content):
            raise ValueError("a truncated PNG")
        kind = content[place + 4 : place + 8]
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError("a damaged PNG: a checksum differs")
        if kind in _NEEDED_CHUNKS:
            needed.append(view[place:end])
        if kind == b"eXIf":
            exif = Image.Exif()
            exif.load(content[place + 8 : end - 4])
            orientation = exif.get(_ORIENTATION, 1)
        if kind == b"IEND":
            return b"".join(needed), orientation if isinstance(orientation, int) else 1
        place = end
