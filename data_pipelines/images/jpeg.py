"""JPEG bytes to pixels: the size before anything is decoded, then only what is needed of it.

Decoding is exact (the accurate DCT, smooth chroma), so the pixels are Pillow's. Whatever is unusual or damaged is left
to Pillow, whose word on it is the last one.
"""

from __future__ import annotations

import io
import math
import re
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from einops import rearrange
from PIL import Image

from data_pipelines.images.pixels import UnusableImageError
from data_pipelines.images.regions import Choose, Picture, Region, whole

try:  # optional when the package is built: it needs libjpeg-turbo and its header
    from data_pipelines.images.native._jpeg_region import decode_region
except ImportError:
    decode_region = None

MAX_SCANS = 100  # of a progressive JPEG, each a pass over all pixels; encoders make 20 at most
_MAX_SEGMENTS = 10_000  # before the pixels; a profile of colours takes 255 at most, a film in XMP a thousand
_EXIF_ORIENTATION = 0x0112
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_FILL = re.compile(rb"\xff*")
_ALONE = {0x01, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}  # markers that no length follows, or that Pillow reads so
_FRAMES = {0xC0: True, 0xC1: True, 0xC2: False}  # baseline, extended (one scan, as a rule), progressive
_OTHER_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}  # lossless, arithmetic and so on
#: EXIF's orientation to how the stored image becomes upright: transposed, then upside down, then left to right.
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class Header(NamedTuple):
    """What a JPEG says of itself before its first scan."""

    height: int  # as stored
    width: int
    components: int
    sequential: bool  # not progressive
    scan: int  # where the first scan begins, bytes
    orientation: int = 1  # EXIF's, 1 to 8

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        return (self.width, self.height) if _UPRIGHT[self.orientation][0] else (self.height, self.width)


def has_regions() -> bool:
    """Whether parts of an image can be decoded without the rest: the extension was built."""
    return decode_region is not None


def decode_jpeg(
    data: bytes, channels: int, choose: Choose = whole, max_pixels: int | None = None, padded: bool = False
) -> Picture | None:
    """What `choose` asks for of an image, or more of it: (h, w, channels) uint8, upright; None to leave it to Pillow.

    Args:
        data: The file.
        channels: 3 (RGB) or 1 (luma).
        choose: Called once the size is known, before any pixel is decoded.
        max_pixels: Larger images are left to Pillow.
        padded: The pixels may lie four bytes apart, which is decoded faster.
    """
    try:
        header = read_header(data)
        if header is None or (max_pixels is not None and header.height * header.width > max_pixels):
            return None
        region = choose(header.size)
        return _decode_region(data, header, region, channels, padded) or _decode_whole(
            data, header, region, channels, padded
        )
    except ValueError:  # simplejpeg's and the region decoder's for anything amiss
        return None


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG of 8 bits and 1 or 3 components; None for all else. Reads no further than the first scan."""
    if data[:2] != b"\xff\xd8":
        return None
    place, frame, exif, num_segments = 2, None, b"", 0
    while place + 4 <= len(data) and num_segments < _MAX_SEGMENTS:
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place = _end_of_fill(data, place) - 1
            continue
        if marker in _OTHER_FRAMES or marker == 0x01 or 0xD0 <= marker <= 0xD9:
            return None
        length = data[place + 2] << 8 | data[place + 3]
        end = place + 2 + length
        if length < 2 or end > len(data):
            return None
        if marker == 0xDA:
            break
        if marker in _FRAMES:
            if frame is not None or length < 8:
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            frame = (height, width, components, _FRAMES[marker])
            if precision != 8 or components not in (1, 3) or not height or not width:
                return None
        elif not exif and _is_exif(data, place):  # further ones hold what the first had no room for
            exif = data[place + 10 : end]
        place, num_segments = end, num_segments + 1
    else:
        return None
    if frame is None or (not frame[3] and data.count(b"\xff\xda") > MAX_SCANS):
        return None
    return Header(*frame, scan=place, orientation=_orientation(data, exif) if exif else 1)


def tidied(data: bytes) -> bytes:
    """A JPEG as Pillow may see it, which reads byte by byte what lies between segments, and joins all EXIF ones.

    Fill bytes and other litter before the first scan are left out, and of several EXIF segments all but the first.

    Raises:
        UnusableImageError: There are more segments than anybody means.
    """
    kept: list[bytes] = []
    begin, place, num_segments, has_exif = 0, 2, 0, False
    while num_segments < _MAX_SEGMENTS:
        match = _MARKER.search(data, place)
        if match is None:
            return b"".join((*kept, data[begin:place]))
        start, marker, num_segments = match.start(), data[match.start() + 1], num_segments + 1
        if start > place:
            kept.append(data[begin:place])
            begin = start
        end = start + 2 if marker in _ALONE else start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == 0xDA or end > len(data):
            return b"".join((*kept, data[begin:])) if kept else data
        if _is_exif(data, start):
            if has_exif:
                kept.append(data[begin:start])
                begin = end
            has_exif = True
        place = end
    reason = f"a JPEG of more than {_MAX_SEGMENTS:,} segments before its pixels; pack a copy of it"
    raise UnusableImageError("too_large", reason)


def _is_exif(data: bytes, place: int) -> bool:
    return data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0"


def _end_of_fill(data: bytes, place: int) -> int:
    """Where bytes of 255 end."""
    match = _FILL.match(data, place)
    return place if match is None else match.end()


def _orientation(data: bytes, exif: bytes) -> int:
    """EXIF's orientation: from the first directory in its plain form, else by Pillow, which knows all forms."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is not None:
        try:
            (directory,) = struct.unpack_from(order + "I", exif, 4)
            (count,) = struct.unpack_from(order + "H", exif, directory)
            for entry in range(directory + 2, directory + 2 + 12 * count, 12):
                tag, kind, number, value = struct.unpack_from(order + "HHIH", exif, entry)
                if tag == _EXIF_ORIENTATION and (kind, number) == (3, 1) and value in _UPRIGHT:
                    return int(value)
        except struct.error:
            pass
    try:
        value = Image.open(io.BytesIO(tidied(data)), formats=("JPEG",)).getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as error:  # of many types; Pillow will say so again when it is asked for the pixels
        raise ValueError("Pillow cannot read the EXIF data") from error
    return value if value in _UPRIGHT else 1


def _decode_region(data: bytes, header: Header, region: Region, channels: int, padded: bool) -> Picture | None:
    """Only the part; None where that cannot be done, or where the whole is asked for."""
    if decode_region is None or not header.sequential or region.box == whole(header.size).box:
        return None
    factor = region.factor
    left, top, right, bottom = _stored(region.box, header)
    left, top, right, bottom = left // factor, top // factor, -(-right // factor), -(-bottom // factor)
    pixels = np.empty((bottom - top, right - left, 1 if channels == 1 else 4 if padded else 3), dtype=np.uint8)
    try:
        decode_region(data, header.scan, pixels, (header.height, header.width), factor, (left, top))
    except ValueError:  # damaged, cut off, or of several scans
        return None
    return _upright(pixels[:, :, :channels], header, left, top, factor)


def _decode_whole(data: bytes, header: Header, region: Region, channels: int, padded: bool) -> Picture:
    """All of the image, at the part's factor. Raises ValueError for damage."""
    colours = "GRAY" if channels == 1 else "RGBX" if padded else "RGB"
    factor = region.factor
    if factor > 1:
        size = (math.ceil(header.height / factor), math.ceil(header.width / factor))
        pixels = simplejpeg.decode_jpeg(data, colours, min_height=size[0], min_width=size[1], min_factor=factor)
        if pixels.shape[:2] != size:
            raise ValueError(f"decoded to {pixels.shape[:2]} px instead of {size}")
    else:
        pixels = simplejpeg.decode_jpeg(data, colours)
    return _upright(pixels[:, :, :channels], header, 0, 0, factor)


def _stored(box: tuple[int, int, int, int], header: Header) -> tuple[int, int, int, int]:
    """A box of the upright image in px of the stored one."""
    height, width = header.size
    transposed, upside_down, mirrored = _UPRIGHT[header.orientation]
    left, top, right, bottom = box
    if mirrored:
        left, right = width - right, width - left
    if upside_down:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if transposed else (left, top, right, bottom)


def _upright(pixels: np.ndarray, header: Header, left: int, top: int, factor: int) -> Picture:
    """Decoded pixels, which begin at (left, top) decoded px of the stored image, as a view of the upright image."""
    transposed, upside_down, mirrored = _UPRIGHT[header.orientation]
    left, top = factor * left, factor * top
    if transposed:
        pixels, left, top = rearrange(pixels, "h w c -> w h c"), top, left
    height, width = header.size
    if upside_down:
        pixels, top = pixels[::-1], height - top - factor * pixels.shape[0]
    if mirrored:
        pixels, left = pixels[:, ::-1], width - left - factor * pixels.shape[1]
    return Picture(pixels, left, top, factor)
