"""Images made smaller while they are packed: a run then decodes them faster."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_pipelines.images.decode import (
    TURNS,
    BadSampleError,
    decode,
    frames,
    is_transparent,
    look,
    open_image,
    orientation_of,
)
from data_pipelines.images.pixels import Header
from data_pipelines.images.sample import Sample

REENCODED = "re-encoded"
SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")
#: Side in px that a reduced decode of a JPEG keeps, as a multiple of the final one. At 2 the result is within 47 dB of
#: a full decode followed by the same filter, and 2000 x 1500 px become 427 x 320 in a third of the time.
_REDUCING_GAP = 2.0
_MAX_JPEG_SIDE = 65_500  # px, libjpeg's
_MODES = {"RGB": "RGB", "L": "L", "CMYK": "RGB", "YCbCr": "RGB", "P": "RGB", "1": "L"}


@dataclass(frozen=True)
class Reencoding:
    """How images become smaller JPEGs.

    An image whose short side is larger than `max_short_side` is decoded, turned as its EXIF says, resized by Lanczos'
    filter with antialiasing and written as a baseline JPEG without EXIF. The colour profile (ICC) goes along, except of
    CMYK, whose pixels become RGB. Smaller images keep their bytes, unless `everything` is to be re-encoded. What a JPEG
    cannot hold keeps its bytes always: transparency, 16 bits, TIFF and arrays, several frames.

    Args:
        max_short_side: px; None: no image is resized.
        quality: Of the JPEG, 1 to 95.
        subsampling: Of its chroma; 4:2:0 is the fastest to decode.
        everything: Also what is small enough.
    """

    max_short_side: int | None = None
    quality: int = 90
    subsampling: str = "4:2:0"
    everything: bool = False

    def __post_init__(self) -> None:
        if self.max_short_side is not None and self.max_short_side < 8:
            raise ValueError(f"max_short_side is {self.max_short_side} px; it must be 8 or more")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}; of a JPEG it must be 1 .. 95")
        if self.subsampling not in SUBSAMPLINGS:
            raise ValueError(f"subsampling is {self.subsampling!r}; it must be one of {', '.join(SUBSAMPLINGS)}")
        if self.max_short_side is None and not self.everything:
            raise ValueError("nothing would be re-encoded; give max_short_side, or re-encode everything")


class Prepared(NamedTuple):
    """An image as it goes into a shard."""

    content: bytes
    suffix: str  # of its format
    width: int  # px as stored, before EXIF turns it
    height: int
    mode: str  # as in `Header`
    outcome: str  # `REENCODED`, or why its bytes were kept


_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "NPY": "npy"}
_DECODED_BY_PILLOW = ("JPEG", "MPO", "PNG", "WEBP")


def prepare(content: bytes, reencoding: Reencoding | None = None, decode_all: bool = False) -> Prepared:
    """Look at an image and, if asked, make it smaller.

    Args:
        content: The file.
        reencoding: None: the bytes are kept.
        decode_all: Decode the pixels too, where only the header is needed.

    Raises:
        Exception: One of `decode.DAMAGE`: not an image that a run could use.
    """
    header = look(content)
    outcome = _why_kept(header, reencoding)
    if outcome is None:
        assert reencoding is not None
        with open_image(content) as image:
            outcome = _why_no_jpeg(image)
            if outcome is None:
                return _encode(image, reencoding)
    if decode_all:
        try:
            decode(Sample("", Path(), content, None), None, None)
        except BadSampleError as error:
            raise ValueError(error.reason) from error
    return Prepared(content, _SUFFIXES[header.format], header.width, header.height, header.mode, outcome)


def _why_kept(header: Header, reencoding: Reencoding | None) -> str | None:
    """Why an image of this header keeps its bytes; None: if a JPEG can hold it, it is re-encoded."""
    if reencoding is None:
        return "as it was"
    size = (header.width, header.height)
    if _scaled(size, reencoding) == size and not reencoding.everything:
        return "small"
    if header.format not in _DECODED_BY_PILLOW:
        return header.format
    if header.bits > 8:
        return "16 bits"
    return None if max(_scaled(size, reencoding)) <= _MAX_JPEG_SIDE else "too long for a JPEG"


def _why_no_jpeg(image: Image.Image) -> str | None:
    if frames(image) > 1 and image.format != "MPO":  # a phone's JPEG with further pictures
        return "several frames"
    if is_transparent(image):
        return "transparent"
    return None if image.mode in _MODES else f"mode {image.mode}"


def _scaled(size: tuple[int, int], reencoding: Reencoding) -> tuple[int, int]:
    """Width and height with a short side of at most what is asked for."""
    short = min(size)
    side = short if reencoding.max_short_side is None else min(short, reencoding.max_short_side)
    return max(1, round(size[0] * side / short)), max(1, round(size[1] * side / short))


def _encode(image: Image.Image, reencoding: Reencoding) -> Prepared:
    size = _scaled(image.size, reencoding)
    shrinks = size != image.size
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "L") else None
    turn = TURNS.get(orientation_of(image))
    if shrinks:  # only JPEG knows how
        image.draft(None, (int(size[0] * _REDUCING_GAP), int(size[1] * _REDUCING_GAP)))
    image.load()
    pixels = image if image.mode == _MODES[image.mode] else image.convert(_MODES[image.mode])
    if shrinks:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    if turn is not None:
        pixels = pixels.transpose(turn)
    file = io.BytesIO()
    pixels.save(
        file,
        "JPEG",
        quality=reencoding.quality,
        subsampling=reencoding.subsampling,
        icc_profile=profile,
        comment=None,
    )
    return Prepared(file.getvalue(), "jpg", pixels.width, pixels.height, pixels.mode, REENCODED)
