"""Bytes to an image: an array of 8-bit channels, whatever the file holds."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, UnidentifiedImageError

from data_pipelines.cases import shown
from data_pipelines.index import Sample
from data_pipelines.jpeg import MAX_SCANS, decode_jpeg
from data_pipelines.magic import kind_of
from data_pipelines.parts import Choose, Picture, whole

FORMATS = ("JPEG", "PNG", "WEBP")  # no other decoder ever sees the bytes
MAX_PIXELS = 89_478_485  # Pillow's limit of what may be a decompression bomb; 256 MB as RGB
_ORIENTATION = 0x0112  # EXIF's tag
#: By its value, what turns an image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
warnings.filterwarnings("ignore", module=r"PIL\.")  # of what they tell, no sample's name; errors are told with it


class UnusableImageError(ValueError):
    """An image that is not tried; `case` is one of `CASES`."""

    def __init__(self, case: str, reason: str) -> None:
        super().__init__(reason)
        self.case = case


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in words that are the same every time, fit to be printed."""
    return shown(str(error)) or type(error).__name__


class BadSampleError(ValueError):
    """One sample that is not an image that can be used: its key, its shard, the reason and its name in `CASES`."""

    def __init__(self, key: str, shard: Path, reason: str, case: str = "damaged_image") -> None:
        super().__init__(f"sample {shown(key)} of {shard}: {reason}")
        self.key, self.shard, self.reason, self.case = key, shard, reason, case

    @classmethod
    def of(cls, sample: Sample, error: Exception) -> BadSampleError:
        """For what a decoder raised on a sample."""
        return cls(sample.key, sample.shard, reason_of(error), getattr(error, "case", "damaged_image"))


def open_image(content: bytes) -> Image.Image:
    """An image file whose header has been read, and no pixel yet.

    Raises:
        UnusableImageError: Not a JPEG, PNG or WebP image, or of more than `MAX_PIXELS` pixels.
        Exception: One of `DAMAGE`.
    """
    if not content:
        raise UnusableImageError("empty_image", "a file of no bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        kind = kind_of(content)
        if kind is None:
            raise UnusableImageError("not_an_image", "not a JPEG, PNG or WebP image") from None
        if kind.name in ("a JPEG", "a PNG", "a WebP"):
            raise UnusableImageError(
                "damaged_image", f"{kind.name} whose header is damaged or of a rare kind"
            ) from None
        case = "other_format" if kind.is_image else "not_an_image"
        raise UnusableImageError(case, f"not a JPEG, PNG or WebP image: it is {kind.name}") from None
    except Image.DecompressionBombError as error:
        raise UnusableImageError("too_large", str(error)) from error
    if image.width * image.height > MAX_PIXELS:
        reason = f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}; pack a smaller copy"
        raise UnusableImageError("too_large", reason)
    if image.format in ("JPEG", "MPO") and (num_scans := content.count(b"\xff\xda")) > MAX_SCANS:
        raise UnusableImageError("too_large", f"a JPEG of {num_scans} scans, more than {MAX_SCANS}; pack a copy of it")
    return image


def decode(sample: Sample, channels: int = 3) -> np.ndarray:
    """A sample's image: (h, w, channels) uint8; 3 channels are red, green and blue, 1 is grey.

    The orientation in EXIF is applied, so that up is up. Transparent pixels become black. Of 16-bit
    images the high byte is kept, of animated ones the first frame. `CASES` has the whole list.

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
        image = open_image(sample.image)
        image.load()
        turn = _TURNS.get(orientation_of(image))
        if turn is not None:
            image = image.transpose(turn)
        pixels = np.asarray(_converted(image, "RGB" if channels == 3 else "L"))
        return pixels if pixels.ndim == 3 else rearrange(pixels, "h w -> h w 1")
    except DAMAGE as error:
        raise BadSampleError.of(sample, error) from error


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 .. 8; 1, upright, where there is none or EXIF is damaged, as the pixels need not be."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (*DAMAGE, KeyError, TypeError, AttributeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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
