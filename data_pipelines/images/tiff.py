"""TIFF files from bytes in memory: images of 8- and 16-bit channels as scanners, microscopes and satellites have them.

tifffile reads the tags and imagecodecs the pixels. A shard may come from a stranger, so what they would take is
bounded before: tifffile sees no tag but those of `_TAGS`, and imagecodecs only what has been told to fit.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from einops import rearrange
from tifffile import COMPRESSION, PHOTOMETRIC, SAMPLEFORMAT, TiffFile, TiffFileError, TiffPage

from data_pipelines.images.npy import channel_axis
from data_pipelines.images.pixels import (
    Header,
    UnusableImageError,
    check_size,
    over_black,
    turned,
    unlike_opacity,
)
from data_pipelines.images.regions import Picture

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it tells of damage there, and no sample's name

#: Those whose decoders are told how much to write; JPEG and its like take what their own headers say.
_COMPRESSIONS = (
    COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.PACKBITS,
    COMPRESSION.ZSTD,
)  # fmt: skip
_PHOTOMETRICS = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE)
_WORDS = {SAMPLEFORMAT.INT: "signed", SAMPLEFORMAT.IEEEFP: "floating-point", 5: "complex", 6: "complex"}
_DESCRIPTION, _ORIENTATION, _COLOURS = 270, 274, 320
#: What tifffile says in it of the array that it stored, in the words of all its versions.
_SHAPE = re.compile(rb"shape\"?\s*[:=]\s*[\[(]((?:[0-9]{1,9},?\s*){1,8})[\])]")
_AXES = re.compile(rb"axes\"?\s*[:=]\s*[\"']?([A-Z]{1,8})\b")
_MAX_DESCRIPTION = 4096  # bytes that are looked at
#: What describes the pixels: sizes, depth, layout and places. Of others some are read by programs of their own.
_TAGS = (
    254, 255, 256, 257, 258, 259, 262, 266, 273, _ORIENTATION, 277, 278, 279, 284, 317, _COLOURS, 322, 323, 324, 325,
    338, 339,
)  # fmt: skip
_WIDTHS = {1: 1, 3: 2, 4: 4, 13: 4, 16: 8, 18: 8}  # bytes of a value by its type: the unsigned integers
_MAX_PAGES = 4096
_MAX_TAG_BYTES = 16 << 20  # of all pages; two million strips


class _Image(NamedTuple):
    """The pages that make the image."""

    pages: list[TiffPage]
    by_rows: bool  # each page is a row of it, and its columns are the channels
    num_images: int  # in the file


def read_tiff(content: bytes, channels: int | None) -> Picture:
    """(h, w, c) uint8 or uint16 in native byte order.

    Strips or tiles, channels together or in planes, uncompressed or by Deflate, LZW, PackBits or Zstandard, with or
    without differences between neighbours; BigTIFF too. Several pages of one size with one channel each are the
    channels of one image, or its rows where tifffile made a page of each row of (h, w, c). Of other files the first
    page that is no smaller copy counts, and the notes say so. The orientation is applied, a palette looked up,
    white-is-zero inverted. Transparent pixels become black, unless `channels` counts the opacity in.

    Raises:
        ValueError: Damaged, too large, or what is not read (such as JPEG in TIFF, CMYK, other depths).
    """
    with _opened(content, channels) as image:
        first, num = image.pages[0], len(image.pages)
        notes = ("animated",) * (image.num_images > 1)
        if num == 1:
            pixels, more = _read_page(first, channels)
            return Picture(turned(pixels, _orientation(first)), notes=notes + more)
        if channels not in (None, first.imagewidth if image.by_rows else num):
            reason = f"a TIFF of {num} pages of {first.imagewidth}x{first.imagelength} px and one channel each, and "
            raise UnusableImageError("other_channels", f"{reason}data.channels is {channels}")
        check_size(first.imagelength, first.imagewidth, num, first.bitspersample // 8)
        pixels = np.stack([_read_page(page, channels)[0][:, :, 0] for page in image.pages])
        pixels = pixels if image.by_rows else rearrange(pixels, "c h w -> h w c")
        return Picture(turned(pixels, _orientation(first)), notes=notes)


def read_pages(
    content: bytes, wanted: Callable[[int], Sequence[int]], channels: int | None
) -> tuple[list[int], dict[int, np.ndarray]] | None:
    """The `wanted` ones of all pages that are no smaller copies, as frames of a stack: their numbers, and each (h, w,
    c) as of `read_tiff`. None where there is one page. Raises as `read_tiff` does."""
    with _translated():
        file, num_pages, _ = _guarded(content)
        with TiffFile(file) as tiff:
            pages = list(_full_pages(tiff, num_pages))
            if len(pages) == 1:
                return None
            numbers = list(wanted(len(pages)))
            chosen = {number: pages[number] for number in dict.fromkeys(numbers)}
            for page in chosen.values():
                _check_kind(page)
                check_size(
                    page.imagelength, page.imagewidth, page.samplesperpixel * len(chosen), page.bitspersample // 8
                )
            _check_places(list(chosen.values()), len(content))
            found = {n: turned(_read_page(page, channels)[0], _orientation(page)) for n, page in chosen.items()}
            return numbers, found


def look_at_tiff(content: bytes) -> Header:
    """What the tags say; raises as `read_tiff` does. `channels` is None where pages are as many as they are wide."""
    try:
        with _opened(content, None) as image:
            first = image.pages[0]
            channels: int | None = len(image.pages) if len(image.pages) > 1 else _channels(first)
            width, height, num_images = first.imagewidth, first.imagelength, image.num_images
            if image.by_rows:
                width, height, channels = height, len(image.pages), width
    except _UnclearAxesError as error:
        first, channels, num_images = error.first, None, 1
        width, height = first.imagewidth, first.imagelength
    has_opacity = _opacity(first) is not None
    mode = f"{channels or 'any'} x uint{first.bitspersample}{' with opacity' * has_opacity}"
    mode = "palette" if first.photometric == PHOTOMETRIC.PALETTE else mode
    return Header("TIFF", width, height, channels, first.bitspersample, mode, has_opacity, num_images)


class _UnclearAxesError(UnusableImageError):
    def __init__(self, first: TiffPage, num_pages: int) -> None:
        shape = f"{num_pages}x{first.imagelength}x{first.imagewidth}"
        reason = f"a TIFF of {shape} may be (h, w, c) as well as (c, h, w) with c = {num_pages}; store it in one page"
        super().__init__("other_channels", reason)
        self.first = first


@contextmanager
def _opened(content: bytes, channels: int | None) -> Iterator[_Image]:
    """The image, its pages checked."""
    with _translated():
        file, num_pages, description = _guarded(content)
        with TiffFile(file) as tiff:
            pages = list(_full_pages(tiff, num_pages))
            first = pages[0]
            _check_kind(first)
            image = _Image([first], False, len(pages))
            if len(pages) > 1 and first.samplesperpixel == 1 and all(_is_alike(page, first) for page in pages):
                image = _grouped(pages, description, channels)
            _check_places(image.pages, len(content))
            yield image


@contextmanager
def _translated() -> Iterator[None]:
    """Whatever the two libraries raise, as a ValueError."""
    try:
        yield
    except Exception as error:  # whatever the two libraries stumble over
        if isinstance(error, (ValueError, MemoryError)) and not isinstance(error, TiffFileError):
            raise
        raise ValueError(f"a damaged TIFF: {type(error).__name__}: {error}") from error


def _full_pages(tiff: TiffFile, num_pages: int) -> Iterator[TiffPage]:
    """The pages that are no smaller copy and no mask of another; the first if all are."""
    found = 0
    for number in range(num_pages):
        try:
            page = tiff.pages.first if number == 0 else tiff.pages.get(number)
        except Exception:  # a later page may be damaged without harm to those before
            if number == 0:
                raise
            continue
        if isinstance(page, TiffPage) and not page.subfiletype & 5:
            found += 1
            yield page
    if not found:
        yield tiff.pages.first


def _grouped(pages: list[TiffPage], description: bytes, channels: int | None) -> _Image:
    """Pages of one channel each as an image of many: they are its channels, or its rows.

    tifffile stores an array of more than four channels without a word on them as one page for each entry of its first
    axes, and tells the array's shape; then the axes are told apart as those of an array, see `channel_axis`.
    """
    first, num_images = pages[0], 1
    shape = [int(side) for side in _SHAPE.findall(description)[:1] for side in side.replace(b",", b" ").split()]
    shape = [side for side in shape[:-2] if side > 1] + shape[-2:]
    told = shape[-2:] == [first.imagelength, first.imagewidth] and math.prod(shape[:-2]) == len(pages)
    if told and len(shape) > 3:  # several images
        num_images = math.prod(shape[:-3])
        pages = pages[: shape[-3]]
    sides = (len(pages), first.imagelength, first.imagewidth)
    axes = _AXES.search(description) if told else None
    if axes is not None and axes[1][-3:] in (b"CYX", b"SYX", b"YXC", b"YXS"):
        return _Image(pages, axes[1].endswith((b"C", b"S")), num_images)
    if not told:  # another program's pages are channels, or rows where only so there are as many as asked for
        return _Image(pages, channels not in (None, sides[0]) and channels == sides[2], num_images)
    try:
        axis = channel_axis(sides, channels)
    except UnusableImageError:  # the caller tells of the pages
        axis = 0
    if axis is None:
        raise _UnclearAxesError(first, len(pages))
    return _Image(pages, axis == -1, num_images)


def _guarded(content: bytes) -> tuple[io.BytesIO, int, bytes]:
    """The file with all tags blanked that are not of `_TAGS`, how many pages it has, and what the first says of itself;
    sizes are checked."""
    file = io.BytesIO(content)
    view = file.getbuffer()
    order, big = "<" if content[:2] == b"II" else ">", b"+" in content[2:4]
    of_number, of_size = np.dtype(order + ("u8" if big else "u2")), np.dtype(order + ("u8" if big else "u4"))
    of_entry = np.dtype([("tag", order + "u2"), ("type", order + "u2"), ("count", of_size), ("value", of_size)])

    def read(dtype: np.dtype, number: int, start: int) -> np.ndarray:
        if start + number * dtype.itemsize > len(content):
            raise ValueError("a truncated TIFF: a page lies beyond the end of the file")
        return np.frombuffer(view, dtype, number, start)

    place, total = int(read(of_size, 1, 8 if big else 4)[0]), 0
    ends: dict[int, int] = {}  # of the pages' tags by their start
    blanks: list[tuple[np.ndarray, np.ndarray]] = []
    description = b""
    while place:
        if place in ends:
            raise ValueError("a damaged TIFF: its pages go in a circle")
        if len(ends) == _MAX_PAGES:
            raise UnusableImageError(
                "too_large",
                f"a TIFF of more than {_MAX_PAGES} pages; store the image in one (tifffile makes a page of each row of "
                "(h, w, c) unless it is told planarconfig='contig')",
            )
        entries = read(of_entry, int(read(of_number, 1, place)[0]), place + of_number.itemsize)
        known = np.isin(entries["tag"], _TAGS)
        if not blanks:
            for entry in entries[entries["tag"] == _DESCRIPTION][:1]:
                description = content[int(entry["value"]) :][: min(int(entry["count"]), _MAX_DESCRIPTION)]
        blanks.append((entries, ~known))
        tags = entries[known]
        widths = np.array([_WIDTHS.get(kind, 0) for kind in tags["type"].tolist()], dtype=float)
        sizes = widths * tags["count"]
        outside = sizes > of_size.itemsize
        if not sizes.all() or (outside & (tags["value"] + sizes > len(content))).any():
            raise ValueError("a truncated TIFF: the values of a tag are none, or lie beyond the end of the file")
        total += entries.nbytes + int(sizes.sum())
        if total > _MAX_TAG_BYTES:
            raise UnusableImageError("too_large", f"a TIFF whose tags are more than {_MAX_TAG_BYTES} bytes")
        ends[place] = place + of_number.itemsize + entries.nbytes + of_size.itemsize
        place = int(read(of_size, 1, ends[place] - of_size.itemsize)[0])
    if not ends or any(ends[a] > b for a, b in itertools.pairwise(sorted(ends))):
        raise ValueError("a TIFF without an image, or of pages that lie over each other")
    for entries, unknown in blanks:
        entries[unknown] = np.array((0, 1, 0, 0), dtype=of_entry)  # tag 0, no bytes
    return file, len(ends), description


def _check_kind(page: TiffPage) -> None:
    """Raise ValueError for a page that is of a kind that is not read, or of a size that cannot be meant."""
    depth, kind, samples = page.bitspersample, page.sampleformat, page.samplesperpixel
    if depth not in (8, 16) or kind not in (SAMPLEFORMAT.UINT, SAMPLEFORMAT.VOID):
        words = f"{depth if isinstance(depth, int) else 'various'}-bit {_WORDS.get(kind, 'unsigned')}"
        reason = f"a TIFF of {words} numbers; unsigned ones of 8 or 16 bits are read, scaled to their range"
        raise UnusableImageError("other_format", reason)
    check_size(page.imagelength, page.imagewidth, samples, depth // 8)
    if page.compression not in _COMPRESSIONS:
        reason = f"a TIFF whose compression is {_name(page.compression)}; store it by Deflate, LZW or none"
        raise UnusableImageError("other_format", reason)
    if page.photometric not in _PHOTOMETRICS:
        known = "CMYK" if page.photometric == PHOTOMETRIC.SEPARATED else _name(page.photometric)
        reason = f"a TIFF that is {known}; store it as grey, RGB or plain channels"
        raise UnusableImageError("other_format", reason)
    if page.photometric == PHOTOMETRIC.RGB and samples < 3:
        raise ValueError(f"a TIFF that is RGB and has {samples} channel{'s' * (samples > 1)}")
    if page.photometric == PHOTOMETRIC.PALETTE and (samples, depth, page.tags[_COLOURS].count) != (1, 8, 3 * 256):
        raise UnusableImageError("other_format", "a TIFF whose palette is not 256 colours of 8-bit indices")
    if page.predictor not in (1, 2) or page.fillorder != 1:
        reason = "a TIFF of a predictor for floating-point numbers, or of reversed bits"
        raise UnusableImageError("other_format", reason)
    if page.planarconfig not in (1, 2):
        raise ValueError(f"a TIFF whose planar configuration is {page.planarconfig}; it is 1 or 2")
    if page.is_tiled:  # tiles go beyond the border, so they have a limit of their own
        tiles = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
        check_size(tiles[0] * page.tilelength, tiles[1] * page.tilewidth, samples, depth // 8)


def _check_places(pages: list[TiffPage], file_size: int) -> None:
    """Raise ValueError where the strips or tiles are not in the file, or too much is read for what becomes of it."""
    total = 0
    for page in pages:
        offsets, counts, num = page.dataoffsets, page.databytecounts, math.prod(page.chunked)
        if min(len(offsets), len(counts)) < num:
            raise ValueError(f"a TIFF of {num} pieces that says where {min(len(offsets), len(counts))} of them are")
        if any(not 0 < count <= file_size - offset for offset, count in zip(offsets, counts, strict=False)):
            raise ValueError("a truncated TIFF: its pixels lie beyond the end of the file")
        if page.compression == COMPRESSION.NONE and sum(counts) < page.nbytes:
            raise ValueError(f"a damaged TIFF: {sum(counts)} bytes of pixels where {page.nbytes} should be")
        total += sum(counts)
    if total > file_size + sum(page.nbytes for page in pages):  # some of it may be meant to be in several places
        raise ValueError("a damaged TIFF: the same bytes are the pixels of many places")


def _name(value: int) -> str:
    """Such as JPEG (7)."""
    return f"{getattr(value, 'name', 'unknown')} ({int(value)})"


def _is_alike(page: TiffPage, first: TiffPage) -> bool:
    """Whether the pages may be channels of one image."""
    try:
        _check_kind(page)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return False
    same = page.shape == first.shape and page.dtype == first.dtype and _orientation(page) == _orientation(first)
    return same and page.photometric != PHOTOMETRIC.PALETTE


def _orientation(page: TiffPage) -> int:
    return int(page.tags.valueof(_ORIENTATION, 1))


def _opacity(page: TiffPage) -> int | None:
    """1: the last channel is opacity, and colours are multiplied by it; 2: they are not; None: there is none."""
    colours, extra = 3 if page.photometric == PHOTOMETRIC.RGB else 1, page.extrasamples
    return int(extra[0]) if page.samplesperpixel == colours + 1 and extra and extra[0] in (1, 2) else None


def _channels(page: TiffPage) -> int:
    """Of the image, transparency left out."""
    return 3 if page.photometric == PHOTOMETRIC.PALETTE else page.samplesperpixel - (_opacity(page) is not None)


def _read_page(page: TiffPage, channels: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(h, w, c) as stored, and notes; opacity is applied unless `channels` counts it in."""
    pixels = rearrange(page.asarray(squeeze=False, maxworkers=1), "plane 1 h w c -> h w (plane c)")
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        pixels[:, :, :1] = ~pixels[:, :, :1]
    if page.photometric == PHOTOMETRIC.PALETTE:
        palette = (page.tags[_COLOURS].value.reshape(3, 256).T >> 8).clip(0, 255).astype(np.uint8)
        return palette[pixels[:, :, 0]], ()
    opacity = _opacity(page)
    if opacity is None or channels == page.samplesperpixel:
        return pixels, ()
    return over_black(pixels) if opacity == 2 else pixels[:, :, :-1], unlike_opacity(pixels[:, :, -1])
