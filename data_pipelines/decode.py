"""Bytes to an image: an array of the run's channels and depth, whatever the file holds."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines import rasters
from data_pipelines.index import Sample
from data_pipelines.pixels import MAX_PIXELS, Header, convert

FORMATS = ("JPEG", "PNG", "WEBP")  # of Pillow; no other decoder of its ever sees the bytes
_EXIF_ORIENTATION = 0x0112
_GREY = ("1", "L", "LA", "La")
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
        return "not a JPEG, PNG, WebP, TIFF or npy image"
    return str(error) or type(error).__name__


class BadSampleError(ValueError):
    """One sample that is not an image that can be used; names its key, its shard and the reason."""

    def __init__(self, key: str, shard: Path, reason: str) -> None:
        super().__init__(f"sample {key} of {shard}: {reason}")
        self.key, self.shard, self.reason = key, shard, reason


def decode(sample: Sample, channels: int | None = 3, bits: int | None = 8) -> np.ndarray:
    """A sample's image: (h, w, channels) uint8, or uint16 for 16 bits.

    3 channels are red, green and blue, 1 is grey; None leaves channels or bits as they are stored, less transparency.
    What is done where the file has others, says `pixels.convert`. The orientation in EXIF or TIFF is applied, so that
    up is up. Transparent pixels become black, unless the opacity makes the number of channels right (2 or 4).

    Raises:
        BadSampleError: Truncated, none of the formats, of more than `MAX_PIXELS` pixels, or of other channels.
    """
    try:
        pixels = rasters.read(sample.image, channels)
        if pixels is None:
            pixels = _read(sample.image, channels)
        return np.ascontiguousarray(convert(pixels, channels, bits))
    except DAMAGE as error:
        raise BadSampleError(sample.key, sample.shard, reason_of(error)) from error


def look(content: bytes) -> Header:
    """What an image file says of itself before any pixel is decoded.

    Raises one of `DAMAGE`, whose words `reason_of` gives, for what is none of the formats.
    """
    header = rasters.look(content)
    if header is not None:
        return header
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        channels = 1 if image.mode in _GREY else 3
        return Header(image.format or "", image.width, image.height, channels, 8, image.mode)


def _read(content: bytes, channels: int | None) -> np.ndarray:
    """(h, w, c) uint8 of one of Pillow's formats."""
    image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}; pack a smaller copy")
    image.load()
    if "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if (image.mode, channels) not in (("RGBA", 4), ("LA", 2)):
        image = _converted(image, "L" if image.mode in _GREY else "RGB")
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else rearrange(pixels, "h w -> h w 1")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image).convert("RGB")
    return image.convert(mode)
