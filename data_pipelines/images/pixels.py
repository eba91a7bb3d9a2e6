"""Arrays of pixels, whatever file they come from: how large they may be, and how depths and channels are matched."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485  # Pillow's limit of what may be a decompression bomb; 256 MB as RGB
MAX_BYTES = 512 << 20  # of the decoded pixels: those of an RGB image of 16 bits at that limit
MAX_EXIF_BYTES = 1 << 16  # a JPEG's segment holds no more; of the rest whole copies would be taken, one a tag
MAX_FILE_BYTES = 1 << 30  # of an image's file: none that is read needs as many, so nothing larger is taken into memory
_ORIENTATION = 0x0112  # EXIF's tag
#: What Pillow raises where it reads damaged EXIF data.
_EXIF_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, struct.error,
    zlib.error,
)  # fmt: skip


class UnusableImageError(ValueError):
    """An image that is not tried; `case` is one of `CASES`."""

    def __init__(self, case: str, reason: str) -> None:
        super().__init__(reason)
        self.case = case


class Header(NamedTuple):
    """What a file says of its image before any pixel is decoded."""

    format: str  # JPEG, PNG, WEBP, TIFF or NPY
    width: int  # px as stored
    height: int
    channels: int | None  # without transparency; None: an array that does not say which axis they are
    bits: int  # of a channel
    mode: str  # Pillow's for its formats; for others such as "13 x uint16"
    transparent: bool = False  # opacity, or a colour that stands for none
    num_images: int = 1  # pictures in the file of which one is used


def check_size(height: int, width: int, channels: int, itemsize: int) -> None:
    """Raise ValueError for an image without pixels, or of more than can be meant; before memory is taken for it."""
    if min(height, width, channels) < 1:
        raise ValueError(f"an image of {width}x{height} pixels and {channels} channels has nothing in it")
    if height * width > MAX_PIXELS:
        reason = f"{width}x{height} pixels are more than {MAX_PIXELS}; pack a smaller copy"
        raise UnusableImageError("too_large", reason)
    if height * width * channels * itemsize > MAX_BYTES:
        reason = f"{width}x{height} pixels of {channels} channels are more than {MAX_BYTES} bytes; pack a smaller copy"
        raise UnusableImageError("too_large", reason)


def check_file_size(num_bytes: int) -> None:
    """Raise ValueError for a file that is larger than any image is, such as a film under the name of an image."""
    if num_bytes > MAX_FILE_BYTES:
        raise UnusableImageError("too_large", f"a file of more than {MAX_FILE_BYTES:,} bytes, which no image needs")


def convert(pixels: np.ndarray, channels: int | None, bits: int | None) -> np.ndarray:
    """(h, w, c) uint8 or uint16 as (h, w, channels) of `bits`; None leaves what there is.

    8 bits become 16 by x 257, so that white stays white; of 16 bits the high byte is kept. Grey (1) is repeated for
    3 channels, and 3 become grey by the luma of ITU-R 601-2, as in Pillow. No other numbers of channels are matched.

    Raises:
        ValueError: Of another number of channels; the reason says both.
    """
    if bits == 8 and pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif bits == 16 and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    found = pixels.shape[2]
    if channels is None or found == channels:
        return pixels
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (found, channels) == (3, 1):
        return luma(pixels)
    reason = f"the image has {found} channel{'s' * (found > 1)} and data.channels is {channels}"
    raise UnusableImageError("other_channels", reason)


def luma(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) to (h, w, 1): .299 R + .587 G + .114 B in Pillow's integers."""
    red, green, blue = (pixels[:, :, channel].astype(np.uint32) for channel in range(3))
    # the factors add up to 65536, so the sum of 16-bit values stays below 2^32
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).astype(pixels.dtype)[:, :, None]


def over_black(pixels: np.ndarray) -> np.ndarray:
    """(h, w, c + 1) whose last channel is opacity, put on black: (h, w, c)."""
    full = np.iinfo(pixels.dtype).max
    colours, opacity = pixels[:, :, :-1].astype(np.uint32), pixels[:, :, -1:]
    return ((colours * opacity + full // 2) // full).astype(pixels.dtype)


def unlike_opacity(opacity: np.ndarray) -> tuple[str, ...]:
    """A note where (h, w) levels are as of a band of light, such as infrared, that is tagged as opacity: an opacity is
    nothing or full nearly everywhere."""
    full = np.iinfo(opacity.dtype).max
    num_clear = np.count_nonzero((opacity == 0) | (opacity == full))
    return ("odd_opacity",) if 2 * num_clear < opacity.size else ()


def orientation_by(read: Callable[[], Image.Exif]) -> int:
    """The orientation, 1 .. 8, of the EXIF data that `read` gives; 1, upright, where they tell none or are damaged, as
    the pixels need not be."""
    try:
        value = read().get(_ORIENTATION, 1)
    except _EXIF_DAMAGE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(h, w, c) as TIFF's and EXIF's tag 274 says that it is to be shown; values that it does not know leave it."""
    if orientation in (5, 6, 7, 8):  # the tag's rows are the image's columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
