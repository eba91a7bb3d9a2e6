"""PNG of 16 bits by OpenCV, as Pillow has no mode of several such channels; what is checked before either sees one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image

from data_pipelines.images.pixels import (
    MAX_EXIF_BYTES,
    Header,
    UnusableImageError,
    check_size,
    orientation_by,
    over_black,
    turned,
    unlike_opacity,
)
from data_pipelines.images.regions import Picture

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NEEDED_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # a transparent colour is applied here, and by none beside
_MAX_SIDE = 1_000_000  # px, libpng's
#: By PNG's type of colour: channels without opacity, whether there is opacity, and Pillow's name for the mode.
_COLOURS = {0: (1, False, "L;16"), 2: (3, False, "RGB;16"), 4: (1, True, "LA;16"), 6: (3, True, "RGBA;16")}


def is_deep_png(content: bytes) -> bool:
    """Whether the file says that it is a PNG of 16 bits."""
    return content[:8] == _SIGNATURE and content[12:16] == b"IHDR" and content[24:25] == b"\x10"


def look_at_png(content: bytes) -> Header:
    """What the header of a PNG of 16 bits says; raises as `read_png` does."""
    width, height = struct.unpack_from(">II", content, 16)
    channels, has_opacity, mode = _colours(content)
    return Header("PNG", width, height, channels, 16, mode, has_opacity or _has_key(content))


def read_png(content: bytes, channels: int | None) -> Picture:
    """(h, w, c) uint16 of a PNG of 16 bits, upright; transparent pixels are black, unless `channels` counts opacity in.

    A colour that stands for transparency (tRNS) is an opacity of nothing or all.

    Raises:
        ValueError: Damaged or too large.
    """
    width, height = struct.unpack_from(">II", content, 16)
    colours, has_opacity, _ = _colours(content)
    check_size(height, width, 4, 2)
    if max(height, width) > _MAX_SIDE:
        raise UnusableImageError("too_large", f"{width}x{height} pixels; a PNG of 16 bits has a million to a side")
    needed, orientation, key = _check_chunks(content)
    pixels = cv2.imdecode(np.frombuffer(needed, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != (height, width):
        raise ValueError("a damaged PNG: its pixels cannot be decoded")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    else:  # OpenCV's order is blue, green, red, and grey with opacity comes as four
        pixels = pixels[:, :, {3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]]
        if colours == 1:
            pixels = pixels[:, :, [0, 3]]
    if key is not None and not has_opacity:
        pixels = np.dstack([pixels, _opacity(pixels, key)])
    notes: tuple[str, ...] = ()
    if pixels.shape[2] == colours + 1 != channels:
        notes = unlike_opacity(pixels[:, :, -1])
        pixels = over_black(pixels)
    return Picture(turned(pixels, orientation), notes=notes)


def key_of_grey(content: bytes, key: int) -> int:
    """The level of 8 bits that stands for transparency in a grey PNG of 1, 2, 4 or 8 bits, from that in the file."""
    return key * 255 // ((1 << content[24]) - 1)


def _colours(content: bytes) -> tuple[int, bool, str]:
    colours = _COLOURS.get(content[25]) if len(content) > 25 else None
    if colours is None:
        raise ValueError("a damaged PNG: no such type of colour")
    return colours


def _opacity(pixels: np.ndarray, key: bytes) -> np.ndarray:
    """(h, w) uint16: 0 where all channels are those of the key, else the highest level."""
    if len(key) != 2 * pixels.shape[2]:
        raise ValueError("a damaged PNG: its transparent colour is none of its colours")
    return np.where((pixels == np.frombuffer(key, ">u2")).all(axis=2), 0, 65535).astype(np.uint16)


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of every chunk's own bytes, up to the last."""
    place = 8
    while True:
        if place + 12 > len(content):
            raise ValueError("a truncated PNG")
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        if end + 4 > len(content):
            raise ValueError("a truncated PNG")
        kind = content[place + 4 : place + 8]
        yield kind, place + 8, end
        if kind == b"IEND":
            return
        place = end + 4


def _has_key(content: bytes) -> bool:
    """Whether a colour stands for transparency; it is told before the pixels."""
    try:
        for kind, _, _ in _chunks(content):
            if kind in (b"tRNS", b"IDAT"):
                return kind == b"tRNS"
    except ValueError:  # whoever reads the pixels tells of it
        pass
    return False


def _orientation_in(content: bytes) -> int:
    """That of EXIF's own bytes."""
    exif = Image.Exif()

    def read() -> Image.Exif:
        exif.load(content)
        return exif

    return orientation_by(read)


def _check_chunks(content: bytes) -> tuple[bytes, int, bytes | None]:
    """Walk the chunks of a PNG to its end and compare their checksums: the file with only those chunks that its pixels
    need, the orientation that its EXIF tells, and the colour that stands for transparency.

    libpng would do the same, but tells of damage and of odd colour profiles on the standard error of the whole process.
    """
    orientation, key = None, None
    needed: list[bytes | memoryview] = [_SIGNATURE]
    view = memoryview(content)
    for kind, begin, end in _chunks(content):
        if zlib.crc32(view[begin - 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("a damaged PNG: a checksum differs")
        if kind in _NEEDED_CHUNKS:
            needed.append(view[begin - 8 : end + 4])
        if kind == b"tRNS":
            key = content[begin:end]
        if kind == b"eXIf" and orientation is None:  # PNG permits one, and a file may have thousands
            orientation = _orientation_in(content[begin : min(end, begin + MAX_EXIF_BYTES)])
    return b"".join(needed), orientation or 1, key
