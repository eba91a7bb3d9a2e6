"""TIFF files from bytes in memory: images of 8- and 16-bit channels as scanners, microscopes and satellites have them.

Written out because a shard may come from a stranger, and for what else there is: Pillow knows four channels of
8 bits, and no reader of TIFF bounds what it takes by the file's own length. Sources: TIFF 6.0 and its BigTIFF.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.images.pixels import MAX_PIXELS, Header, UnusableImageError, check_size, over_black, turned

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NONE, _LZW, _DEFLATE, _OLD_DEFLATE, _PACKBITS = 1, 5, 8, 32946, 32773
_COMPRESSIONS = {2: "CCITT", 3: "CCITT", 4: "CCITT", 6: "JPEG", 7: "JPEG", 34712: "JPEG 2000", 34887: "LERC"}
_COMPRESSIONS |= {34925: "LZMA", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL"}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = 0, 1, 2, 3
_PHOTOMETRICS = {4: "a mask", 5: "CMYK", 6: "YCbCr", 8: "CIE L*a*b*", 32803: "a Bayer mosaic"}
_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # types of the values that we read
_MAX_PAGES = 4096
_NOTHING = np.empty(0, dtype=np.int64)


class _Tag:
    SUBFILE = 254
    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES = 277
    ROWS_PER_STRIP = 278
    STRIP_COUNTS = 279
    PLANAR = 284
    PREDICTOR = 317
    COLOURS = 320
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_COUNTS = 325
    EXTRA = 338
    FORMAT = 339


_KNOWN = frozenset(value for name, value in vars(_Tag).items() if name.isupper())


#: The values of the tags that we know, as they lie in the file: of any number that fits into it, so not yet copied.
_Tags = dict[int, np.ndarray]


class _Variant(NamedTuple):
    """The widths of classic TIFF or BigTIFF in one byte order."""

    order: str  # < or >
    number: str  # how many tags a page has
    size: str  # how many values a tag has, and offsets


@dataclass(frozen=True)
class _Page:
    """One image of the file, its tags checked."""

    height: int
    width: int
    samples: int  # channels, transparency among them
    dtype: np.dtype
    photometric: int
    compression: int
    planar: bool  # one plane a channel, not all channels of a pixel together
    predicted: bool  # each value is the difference to its left neighbour
    orientation: int
    opacity: int | None  # 1: the last channel is opacity, and colours are multiplied by it; 2: they are not
    piece: tuple[int, int]  # height, width of a strip or tile
    tiled: bool
    offsets: np.ndarray
    counts: np.ndarray
    palette: np.ndarray | None  # (entries, 3) uint8

    @property
    def channels(self) -> int:
        """Of the image, transparency left out."""
        return 3 if self.palette is not None else self.samples - (self.opacity is not None)

    @property
    def alike(self) -> tuple[object, ...]:
        """What pages that are the channels of one image have in common."""
        return self.height, self.width, self.dtype, self.orientation, self.channels, self.samples


def read_tiff(content: bytes, channels: int | None) -> np.ndarray:
    """(h, w, c) uint8 or uint16 in native byte order.

    Strips or tiles, channels together or in planes, uncompressed or by Deflate, LZW or PackBits, with or without
    differences between neighbours; BigTIFF too. Several pages of one size with one channel each are the channels of
    one image; of other files the first page counts. The orientation is applied, a palette looked up, white-is-zero
    inverted. Transparent pixels become black, unless `channels` counts the opacity in.

    Raises:
        ValueError: Damaged, too large, or what is not read (such as JPEG in TIFF, CMYK, other depths).
    """
    pages = _pages(content)
    first = pages[0]
    if len(pages) > 1:
        if channels not in (None, len(pages)):
            raise UnusableImageError(
                "other_channels",
                f"a TIFF of {len(pages)} pages of {first.width}x{first.height} px and one channel each, and "
                f"data.channels is {channels}",
            )
        check_size(first.height, first.width, len(pages), first.dtype.itemsize)
        pixels = np.concatenate([_read_page(content, page, None) for page in pages], axis=2)
    else:
        pixels = _read_page(content, first, channels)
    return turned(pixels, first.orientation)


def look_at_tiff(content: bytes) -> Header:
    """What the tags say; raises as `read_tiff` does."""
    pages = _pages(content)
    first = pages[0]
    channels = len(pages) if len(pages) > 1 else first.channels
    name = first.dtype.name
    mode = "palette" if first.palette is not None else f"{channels} x {name}{' with opacity' * bool(first.opacity)}"
    return Header("TIFF", first.width, first.height, channels, 8 * first.dtype.itemsize, mode)


def _pages(content: bytes) -> list[_Page]:
    """The pages that make the image: the first, or all if they are its channels."""
    directories = _directories(content)
    first = _page(content, next(directories))
    if first.channels != 1 or first.samples != 1:
        return [first]
    pages = [first]
    for tags in directories:
        if int(tags.get(_Tag.SUBFILE, [0])[0]) & 5:
            continue  # a smaller copy, or a mask
        try:
            page = _page(content, tags)
        except ValueError:
            return [first]
        if page.alike != first.alike:
            return [first]
        pages.append(page)
    return pages


def _directories(content: bytes) -> Iterator[_Tags]:
    """The tags of one page after the other."""
    order = "<" if content[:2] == b"II" else ">"
    if content[2:4] in (b"+\0", b"\0+"):
        if _unpack(order + "HH", content, 4) != (8, 0):
            raise ValueError("a BigTIFF whose offsets are not of 8 bytes")
        variant, (place,) = _Variant(order, "Q", "Q"), _unpack(order + "Q", content, 8)
    else:
        variant, (place,) = _Variant(order, "H", "I"), _unpack(order + "I", content, 4)
    seen: set[int] = set()
    while place:
        if place in seen or len(seen) == _MAX_PAGES:
            raise ValueError(f"a TIFF of pages in a circle, or of more than {_MAX_PAGES}")
        seen.add(place)
        tags, place = _directory(content, place, variant)
        yield tags
    if not seen:
        raise ValueError("a TIFF without an image")


def _directory(content: bytes, place: int, variant: _Variant) -> tuple[_Tags, int]:
    """The tags that we know with their values, and where the next page is (0: nowhere)."""
    order, number, size = variant
    (num_tags,) = _unpack(order + number, content, place)
    place += struct.calcsize(number)
    entry = struct.Struct(f"{order}HH{size}")
    inline = struct.calcsize(size)  # bytes of values that lie in the entry itself
    if place + num_tags * (entry.size + inline) > len(content):
        raise ValueError("a truncated TIFF: its tags lie beyond the end of the file")
    tags: _Tags = {}
    for _ in range(num_tags):
        tag, kind, length = entry.unpack_from(content, place)
        if tag in _KNOWN:
            letter = _INTEGERS.get(kind)
            if letter is None or not length:
                raise ValueError(f"a TIFF whose tag {tag} is of {length} values of type {kind}")
            width = length * struct.calcsize(letter)
            start = place + entry.size
            if width > inline:
                (start,) = struct.unpack_from(order + size, content, start)
            if start + width > len(content):
                raise ValueError(f"a truncated TIFF: the values of tag {tag} lie beyond the end of the file")
            tags[tag] = np.frombuffer(content, order + letter, length, start)
        place += entry.size + inline
    (following,) = _unpack(order + size, content, place)
    return tags, following


def _unpack(format: str, content: bytes, place: int) -> tuple[int, ...]:
    if place + struct.calcsize(format) > len(content):
        raise ValueError("a truncated TIFF: a page lies beyond the end of the file")
    return struct.unpack_from(format, content, place)


def _page(content: bytes, tags: _Tags) -> _Page:
    """Check the tags of a page and put them together."""

    def value(tag: int, default: int) -> int:
        return int(tags[tag][0]) if tag in tags else default

    def same(tag: int, default: int) -> int:
        """The value that all channels have; 0 where they differ."""
        first = value(tag, default)
        return first if tag not in tags or (tags[tag] == first).all() else 0

    height, width, samples = value(_Tag.HEIGHT, 0), value(_Tag.WIDTH, 0), value(_Tag.SAMPLES, 1)
    depth, kind = same(_Tag.BITS, 1), same(_Tag.FORMAT, 1)
    if depth not in (8, 16) or kind not in (1, 4):  # 4: not said
        words = f"{depth or 'various'}-bit {_FORMATS.get(kind, 'unsigned')}"
        reason = f"a TIFF of {words} numbers; unsigned ones of 8 or 16 bits are read, scaled to their range"
        raise UnusableImageError("other_format", reason)
    dtype = np.dtype(np.uint8 if depth == 8 else np.uint16)
    check_size(height, width, samples, dtype.itemsize)
    compression = value(_Tag.COMPRESSION, _NONE)
    if compression not in (_NONE, _LZW, _DEFLATE, _OLD_DEFLATE, _PACKBITS):
        known = _COMPRESSIONS.get(compression, "of an unknown kind")
        reason = f"a TIFF whose compression is {known} ({compression}); store it by Deflate, LZW or none"
        raise UnusableImageError("other_format", reason)
    photometric = value(_Tag.PHOTOMETRIC, _BLACK_IS_ZERO)
    if photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE):
        known = _PHOTOMETRICS.get(photometric, f"of photometric {photometric}")
        raise UnusableImageError("other_format", f"a TIFF that is {known}; store it as grey, RGB or plain channels")
    if photometric == _RGB and samples < 3:
        raise ValueError(f"a TIFF that is RGB and has {samples} channel{'s' * (samples > 1)}")
    if value(_Tag.PREDICTOR, 1) not in (1, 2) or value(_Tag.FILL_ORDER, 1) != 1:
        reason = "a TIFF of a predictor for floating-point numbers, or of reversed bits"
        raise UnusableImageError("other_format", reason)
    if value(_Tag.PLANAR, 1) not in (1, 2):
        raise ValueError(f"a TIFF whose planar configuration is {value(_Tag.PLANAR, 1)}; it is 1 or 2")
    tiled = _Tag.TILE_OFFSETS in tags
    if tiled:
        piece = (value(_Tag.TILE_HEIGHT, 0), value(_Tag.TILE_WIDTH, 0))
        # pieces go beyond the border, so they have a limit of their own
        check_size(-(-height // max(piece[0], 1)) * piece[0], -(-width // max(piece[1], 1)) * piece[1], samples, 1)
    else:
        piece = (min(value(_Tag.ROWS_PER_STRIP, height), height), width)
        check_size(*piece, samples, 1)
    offsets = tags.get(_Tag.TILE_OFFSETS if tiled else _Tag.STRIP_OFFSETS, _NOTHING)
    counts = tags.get(_Tag.TILE_COUNTS if tiled else _Tag.STRIP_COUNTS, _NOTHING)
    planar = value(_Tag.PLANAR, 1) == 2 and samples > 1
    num_pieces = -(-height // piece[0]) * -(-width // piece[1]) * (samples if planar else 1)
    if not len(counts) and num_pieces == len(offsets) == 1 and compression == _NONE:
        counts = np.array([height * width * samples * dtype.itemsize])  # old writers leave it out
    if min(len(offsets), len(counts)) < num_pieces:
        raise ValueError(f"a TIFF of {num_pieces} pieces that says where {min(len(offsets), len(counts))} of them are")
    extra, colours = value(_Tag.EXTRA, 0), 3 if photometric == _RGB else 1
    opacity = extra if samples == colours + 1 and extra in (1, 2) else None
    palette = None
    if photometric == _PALETTE:
        table = tags.get(_Tag.COLOURS, _NOTHING)
        if samples != 1 or depth != 8 or len(table) != 3 * 256:
            raise UnusableImageError("other_format", "a TIFF whose palette is not 256 colours of 8-bit indices")
        palette = (table.reshape(3, 256).T >> 8).clip(0, 255).astype(np.uint8)
    return _Page(
        height, width, samples, dtype, photometric, compression, planar, value(_Tag.PREDICTOR, 1) == 2,
        value(_Tag.ORIENTATION, 1), opacity, piece, tiled, offsets, counts, palette,
    )  # fmt: skip


def _read_page(content: bytes, page: _Page, channels: int | None) -> np.ndarray:
    """(h, w, c) as stored; opacity is applied unless `channels` counts it in."""
    stored_type = np.dtype(("<" if content[:2] == b"II" else ">") + page.dtype.str[1:])
    pixels = np.empty((page.height, page.width, page.samples), dtype=page.dtype)
    high, wide = page.piece
    down, across = -(-page.height // high), -(-page.width // wide)
    of_piece = 1 if page.planar else page.samples
    for plane in range(page.samples if page.planar else 1):
        part = pixels[:, :, plane : plane + 1] if page.planar else pixels
        for number in range(down * across):
            top, left = number // across * high, number % across * wide
            goal = part[top : top + high, left : left + wide]
            rows = high if page.tiled else len(goal)  # the last strip ends with the image, tiles go on
            shape = (rows, wide, of_piece)
            where = plane * down * across + number
            start, length = int(page.offsets[where]), int(page.counts[where])
            stored = memoryview(content)[start : start + length]
            if len(stored) < length:
                raise ValueError("a truncated TIFF: its pixels lie beyond the end of the file")
            raw = _unpacked(stored, page.compression, rows, wide * of_piece * page.dtype.itemsize)
            values = np.frombuffer(raw, stored_type, rows * wide * of_piece).reshape(shape)
            if page.predicted:
                values = np.cumsum(values, axis=1, dtype=page.dtype)  # differences wrap around
            goal[...] = values[: goal.shape[0], : goal.shape[1]]
    if page.photometric == _WHITE_IS_ZERO:
        pixels[:, :, :1] = ~pixels[:, :, :1]
    if page.palette is not None:
        return page.palette[pixels[:, :, 0]]
    if page.opacity is not None and channels != page.samples:
        return over_black(pixels) if page.opacity == 2 else pixels[:, :, :-1]
    return pixels


def _unpacked(stored: memoryview, compression: int, rows: int, row_bytes: int) -> bytes | memoryview:
    """The bytes of one strip or tile, `rows * row_bytes` of them or more."""
    wanted = rows * row_bytes
    if compression == _NONE:
        unpacked: bytes | memoryview = stored
    elif compression in (_DEFLATE, _OLD_DEFLATE):
        stream = zlib.decompressobj()
        unpacked = stream.decompress(stored, wanted + 1)  # and no more, whatever it would become
        if len(unpacked) == wanted and not stream.eof:
            raise ValueError("a damaged TIFF: compressed pixels without their checksum")
    else:
        unpacked = _by_libtiff(stored, compression, rows, row_bytes)
    if len(unpacked) < wanted:
        raise ValueError(f"a damaged TIFF: {len(unpacked)} bytes of pixels where {wanted} should be")
    return unpacked


def _by_libtiff(stored: memoryview, compression: int, rows: int, row_bytes: int) -> bytes:
    """One strip of LZW or PackBits, given to Pillow's libtiff as a grey image of its own."""
    if rows * row_bytes > MAX_PIXELS:
        reason = f"a TIFF of one piece of {rows * row_bytes} bytes; store it in smaller strips"
        raise UnusableImageError("too_large", reason)
    tags = (
        (_Tag.WIDTH, row_bytes), (_Tag.HEIGHT, rows), (_Tag.BITS, 8), (_Tag.COMPRESSION, compression),
        (_Tag.PHOTOMETRIC, _BLACK_IS_ZERO), (_Tag.STRIP_OFFSETS, 8 + 2 + 9 * 12 + 4), (_Tag.SAMPLES, 1),
        (_Tag.ROWS_PER_STRIP, rows), (_Tag.STRIP_COUNTS, len(stored)),
    )  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    try:
        with Image.open(io.BytesIO(head + stored), formats=("TIFF",)) as image:
            return image.tobytes()
    except (OSError, SyntaxError) as error:
        raise ValueError("a damaged TIFF: its compressed pixels cannot be read") from error
