"""Bytes to an image: an array of 8-bit channels, whatever the file holds."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.index import Sample
from data_pipelines.jpeg import decode_jpeg
from data_pipelines.parts import Choose, Picture, whole

FORMATS = ("JPEG", "PNG", "WEBP")  # no other decoder ever sees the bytes
MAX_PIXELS = 89_478_485  # Pillow's limit of what may be a decompression bomb; 256 MB as RGB
_EXIF_ORIENTATION = 0x0112
#: What Pillow's decoders raise on damaged data.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in words that are the same every time."""
    if isinstance(error, UnidentifiedImageError):  # its own text holds an address in memory
        return "not a JPEG, PNG or WebP image"
    return str(error) or type(error).__name__


class BadSampleError(ValueError):
    """One sample that is not an image that can be used; names its key, its shard and the reason."""

    def __init__(self, key: str, shard: Path, reason: str) -> None:
        super().__init__(f"sample {key} of {shard}: {reason}")
        self.key, self.shard, self.reason = key, shard, reason


def decode(sample: Sample, channels: int = 3) -> np.ndarray:
    """A sample's image: (h, w, channels) uint8; 3 channels are red, green and blue, 1 is grey.

    The orientation in EXIF is applied, so that up is up. Transparent pixels become black. Of 16-bit
    images the high byte is kept.

    Raises:
        BadSampleError: Truncated, not a JPEG, PNG or WebP image, or of more than `MAX_PIXELS` pixels.
    """
    return decode_part(sample, channels).pixels


def decode_part(sample: Sample, channels: int = 3, choose: Choose = whole, padded: bool = False) -> Picture:
    """What `choose` asks for of a sample's image, or more of it; see `decode`.

    Args:
        sample: As stored.
        channels: As of `decode`.
        choose: Called with the height and width of the upright image, for a JPEG before any pixel is decoded.
        padded: The pixels of a JPEG may lie four bytes apart, which is decoded faster.
    """
    picture = decode_jpeg(sample.image, channels, choose, MAX_PIXELS, padded)
    if picture is None:
        picture = Picture(_decode_with_pillow(sample, channels))
        choose(picture.pixels.shape[:2])
    return picture


def _decode_with_pillow(sample: Sample, channels: int) -> np.ndarray:
    try:
        image: Image.Image = Image.open(io.BytesIO(sample.image), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}; pack a smaller copy")
        image.load()
        if "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        pixels = np.asarray(_converted(image, "RGB" if channels == 3 else "L"))
        return pixels if pixels.ndim == 3 else rearrange(pixels, "h w -> h w 1")
    except DAMAGE as error:
        raise BadSampleError(sample.key, sample.shard, reason_of(error)) from error


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = image.convert("I")
        image = wide.point(lambda level: level * (1 / 256)).convert("L")  # a linear map is all that mode I takes
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image).convert("RGB")
    return image.convert(mode)
