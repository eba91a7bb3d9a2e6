"""Bytes to an image, and what happens to the ones that are none.

A sample that cannot be decoded is replaced by its neighbour, counted and logged; beyond a share the run stops.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.index import Dataset, Sample

FORMATS = ("JPEG", "PNG", "WEBP")  # no other decoder ever sees the bytes
MAX_PIXELS = 89_478_485  # Pillow's limit of what may be a decompression bomb; 256 MB as RGB
_MAX_TRIES = 16  # neighbours in a row
_MIN_READS = 1000  # a share of fewer reads means little
_NUM_NAMED = 5
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
_log = logging.getLogger(__name__)


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


class TooManyBadSamplesError(ValueError):
    """More samples could not be decoded than the run permits."""


class Decoded(NamedTuple):
    """An image and which sample it is; that is another than asked for when that one was bad."""

    sample: int
    image: Image.Image
    label: int | None


def decode(sample: Sample, channels: int = 3) -> Image.Image:
    """A sample's image, 8 bits a channel: mode RGB for 3 channels, L for 1.

    The orientation in EXIF is applied, so that up is up. Transparent pixels become black. Of 16-bit
    images the high byte is kept.

    Raises:
        BadSampleError: Truncated, not a JPEG, PNG or WebP image, or of more than `MAX_PIXELS` pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(sample.image), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}; pack a smaller copy")
        image.load()
        if "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _converted(image, "RGB" if channels == 3 else "L")
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


class Decoder:
    """Reads and decodes the samples of a data set for many threads, under one account of the bad ones.

    Args:
        dataset: Where to read.
        channels: 3 or 1.
        max_bad_share: Bad reads beyond this share of all stop the run. The share is of at least 1,000
            reads (of all samples, if they are fewer), so that one early bad sample does not.
    """

    def __init__(self, dataset: Dataset, channels: int = 3, max_bad_share: float = 0.01) -> None:
        self.dataset, self.channels, self.max_bad_share = dataset, channels, max_bad_share
        self.num_reads = 0
        self.num_bad = 0
        self._reasons: dict[int, str] = {}  # by sample, so that each is logged once
        self._lock = Lock()

    def read(self, sample: int) -> Decoded:
        """The sample, or the next one in number that can be decoded (after the last comes the first).

        Raises:
            TooManyBadSamplesError: Beyond the permitted share, or no good one among the next 16.
        """
        for tried in range(_MAX_TRIES):
            number = (sample + tried) % self.dataset.num_samples
            stored = self.dataset.read(number)
            try:
                image = decode(stored, self.channels)
            except BadSampleError as error:
                self._count_bad(number, error)
                continue
            with self._lock:
                self.num_reads += 1
            return Decoded(number, image, stored.label)
        key, shard = self.dataset.key(sample)
        raise TooManyBadSamplesError(
            f"sample {key} of {shard} and the {_MAX_TRIES - 1} after it cannot be decoded; "
            f"see what is wrong with `selfsight verify {shard.parent}`"
        )

    def _count_bad(self, number: int, error: BadSampleError) -> None:
        with self._lock:
            self.num_reads += 1
            self.num_bad += 1
            first_time = number not in self._reasons
            self._reasons.setdefault(number, str(error))
            num_bad, num_reads, reasons = self.num_bad, self.num_reads, list(self._reasons.values())
        if first_time:
            _log.warning("%s; the next good sample takes its place", error)
        if num_bad > self.max_bad_share * max(num_reads, min(_MIN_READS, self.dataset.num_samples)):
            named = reasons[:_NUM_NAMED]
            if len(reasons) > _NUM_NAMED:
                named.append(f"and {len(reasons) - _NUM_NAMED} more")
            raise TooManyBadSamplesError(
                f"{num_bad} of {num_reads} samples read cannot be decoded, more than the permitted share of "
                f"{self.max_bad_share:g} (data.max_bad_share):\n  "
                + "\n  ".join(named)
                + f"\nList all with `selfsight verify {error.shard.parent}`, then pack the data again or permit more."
            )
