"""Bytes to an image: an array of the run's channels and depth, whatever the file holds."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from einops import rearrange
from PIL import Image, UnidentifiedImageError

from data_pipelines.images import rasters
from data_pipelines.images.issues import shown
from data_pipelines.images.jpeg import MAX_SCANS, decode_jpeg, read_header, tidied
from data_pipelines.images.magic import kind_of
from data_pipelines.images.pixels import (
    MAX_EXIF_BYTES,
    MAX_PIXELS,
    Header,
    UnusableImageError,
    check_file_size,
    convert,
    orientation_by,
    unlike_opacity,
)
from data_pipelines.images.plain_png import read_plain_png
from data_pipelines.images.png import key_of_grey
from data_pipelines.images.regions import Choose, Picture, whole
from data_pipelines.images.sample import Sample
from data_pipelines.remote.remote_files import Shard

FORMATS = ("JPEG", "PNG", "WEBP")  # of Pillow; no other decoder of its ever sees the bytes
_GREY = ("1", "L", "LA", "La")
_WITH_OPACITY = ("RGBA", "LA", "PA", "RGBa", "La")
#: By its value, what turns an image upright.
TURNS = {
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


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in words that are the same every time, fit to be printed."""
    return shown(str(error)) or type(error).__name__


class BadSampleError(ValueError):
    """One sample that is not an image that can be used: its key, its shard, the reason and its name in `CASES`."""

    def __init__(self, key: str, shard: Shard, reason: str, case: str = "damaged_image") -> None:
        super().__init__(f"sample {shown(key)} of {shown(str(shard))}: {reason}")
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
    if content[:2] == b"\xff\xd8":
        content = tidied(content)
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        kind = kind_of(content)
        if kind is None:
            raise UnusableImageError("not_an_image", "not a JPEG, PNG, WebP, TIFF or npy image") from None
        if kind.name in ("a JPEG", "a PNG", "a WebP"):
            raise UnusableImageError(
                "damaged_image", f"{kind.name} whose header is damaged or of a rare kind"
            ) from None
        case = "other_format" if kind.is_image else "not_an_image"
        raise UnusableImageError(case, f"not a JPEG, PNG, WebP, TIFF or npy image: it is {kind.name}") from None
    except Image.DecompressionBombError as error:
        reason = f"more than twice the {MAX_PIXELS} pixels that are permitted; pack a smaller copy"
        raise UnusableImageError("too_large", reason) from error
    if image.width * image.height > MAX_PIXELS:
        reason = f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}; pack a smaller copy"
        raise UnusableImageError("too_large", reason)
    if image.format in ("JPEG", "MPO") and (num_scans := content.count(b"\xff\xda")) > MAX_SCANS:
        raise UnusableImageError("too_large", f"a JPEG of {num_scans} scans, more than {MAX_SCANS}; pack a copy of it")
    return image


def decode(sample: Sample, channels: int | None = 3, bits: int | None = 8) -> np.ndarray:
    """A sample's image: (h, w, channels) uint8, or uint16 for 16 bits.

    3 channels are red, green and blue, 1 is grey; None leaves channels or bits as they are stored, less opacity. What
    is done where the file has others, says `pixels.convert`. The orientation in EXIF or TIFF is applied, so that up
    is up. Transparent pixels become black, unless the opacity makes the number of channels right (2 or 4). Of animated
    images the first frame is kept. `CASES` has the whole list.

    Raises:
        BadSampleError: Truncated, none of the formats, of more than `MAX_PIXELS` pixels, or of other channels.
    """
    return decode_picture(sample, channels, bits=bits).pixels


def decode_picture(
    sample: Sample,
    channels: int | None = 3,
    choose: Choose = whole,
    padded: bool = False,
    bits: int | None = 8,
) -> Picture:
    """What `choose` asks for of a sample's image, or more of it; see `decode`.

    Args:
        sample: As stored.
        channels: As of `decode`.
        choose: Called with the height and width of the upright image, for a JPEG before any pixel is decoded.
        padded: The pixels of a JPEG may lie four bytes apart, which is decoded faster.
        bits: As of `decode`.
    """
    try:
        check_file_size(len(sample.image))
    except UnusableImageError as error:
        raise BadSampleError.of(sample, error) from error
    of_jpeg = channels
    if channels is None and (header := read_header(sample.image)) is not None:
        of_jpeg = header.components
    if of_jpeg in (1, 3) and (picture := decode_jpeg(sample.image, of_jpeg, choose, MAX_PIXELS, padded)) is not None:
        return picture._replace(pixels=convert(picture.pixels, None, 16)) if bits == 16 else picture
    picture = _decode_whole(sample, channels, bits)
    choose(picture.pixels.shape[:2])
    return picture


def _decode_whole(sample: Sample, channels: int | None, bits: int | None) -> Picture:
    try:
        picture = rasters.read(sample.image, channels)
        if picture is None:
            picture = _read_with_pillow(sample.image, channels)
        return picture._replace(pixels=np.ascontiguousarray(convert(picture.pixels, channels, bits)))
    except DAMAGE as error:
        raise BadSampleError.of(sample, error) from error


def _read_with_pillow(content: bytes, channels: int | None) -> Picture:
    """(h, w, c) uint8, grey or RGB; with opacity where `channels` counts it in."""
    plain = read_plain_png(content, MAX_PIXELS)
    if plain is not None:
        return Picture(plain)
    image = open_image(content)
    notes = ("animated",) * (frames(image) > 1)
    image.load()
    if image.mode == "L" and isinstance(key := image.info.get("transparency"), int):
        image.info["transparency"] = key_of_grey(content, key)
    turn = TURNS.get(orientation_of(image))
    if turn is not None:
        image = image.transpose(turn)
    converted = _converted(image, channels)
    if converted.mode in ("L", "RGB") and image.mode in ("RGBA", "LA"):
        notes += unlike_opacity(np.asarray(image.getchannel("A")))
    pixels = np.asarray(converted)
    return Picture(pixels if pixels.ndim == 3 else rearrange(pixels, "h w -> h w 1"), notes=notes)


def look(content: bytes) -> Header:
    """What an image file says of itself before any pixel is decoded.

    Raises one of `DAMAGE`, whose words `reason_of` gives, for what is none of the formats.
    """
    header = rasters.look(content)
    if header is not None:
        return header
    with open_image(content) as image:
        channels = channels_of(image)
        return Header(
            image.format or "", image.width, image.height, channels, 8, image.mode, is_transparent(image), frames(image)
        )


def channels_of(image: Image.Image) -> int:
    """1 for what is grey and 3 for what has colours; opacity does not count."""
    return 1 if image.mode in _GREY else 3


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has an opacity, or a colour that stands for transparency."""
    return image.mode in _WITH_OPACITY or "transparency" in image.info


def frames(image: Image.Image) -> int:
    """How many pictures there are in the file; the first is used."""
    return getattr(image, "n_frames", 1)


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 .. 8; 1, upright, where there is none or EXIF is damaged, as the pixels need not be."""
    if "exif" not in image.info:
        return 1
    image.info["exif"] = image.info["exif"][:MAX_EXIF_BYTES]
    return orientation_by(image.getexif)


def _converted(image: Image.Image, channels: int | None) -> Image.Image:
    """Grey or RGB, what is transparent on black; with its opacity where `channels` counts that in."""
    mode = "L" if image.mode in _GREY else "RGB"
    if is_transparent(image):
        with_opacity = image.convert("RGBA")
        if channels == len(mode) + 1:
            return with_opacity.convert(mode + "A")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, with_opacity).convert("RGB")
    return image if image.mode == mode else image.convert(mode)
