"""DICOM files as images: read where images are packed, and packed as PNG, so that no run needs pydicom.

Of a file's attributes only the pixels and what they mean go on; nothing of the patient does.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np

from data_pipelines.images.pixels import UnusableImageError, check_size

SUFFIXES = ("dcm", "dicom")
MAX_FRAMES = 1 << 17  # of a file; a scanned slide has as many tiles
_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_PALETTE = ("Red", "Green", "Blue")
_TAGS = (
    "Modality", "RescaleSlope", "RescaleIntercept", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation", "PlanarConfiguration",
    _SHARED, _PER_FRAME, "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    *(f"{colour}PaletteColorLookupTable{part}" for colour in _PALETTE for part in ("Descriptor", "Data")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in _PALETTE),
)  # fmt: skip
_PIXELS = (0x7FE0, 0x0010)
_ITEM_BYTES = 8  # before each compressed frame
_HOUNSFIELD_LEAST = -1024  # of CT, which has 4,096 levels from there on
_HOUNSFIELD_LEVELS = 4096


class DicomHeader(NamedTuple):
    """What is known before any pixel is decoded."""

    modality: str
    frames: int
    bits_stored: int
    inverted: bool  # MONOCHROME1: white is zero
    colour: bool
    hounsfield: bool  # a CT that says how its levels become Hounsfield units


class _Rescale(NamedTuple):
    """What makes a unit of a level; None where the file does not say."""

    slope: float | None
    intercept: float | None

    def apply(self, levels: np.ndarray) -> np.ndarray:
        return levels * (self.slope or 1.0) + (self.intercept or 0.0)


def is_dicom(start: bytes) -> bool:
    """Whether a file is DICOM by its first 132 bytes."""
    return start[128:132] == b"DICM"


class DicomFile:
    """A file with pixels, of which only what comes before them is read; frames are read one by one, by any thread.

    Raises:
        UnusableImageError: It has none, they are of a kind that is not read, or it is damaged.
        OSError: It cannot be read.
        ValueError: pydicom is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from pydicom import dcmread
            from pydicom.filereader import read_file_meta_info
            from pydicom.uid import DeflatedExplicitVRLittleEndian
        except ImportError as error:
            raise ValueError("reading DICOM needs pydicom, which is not installed: pip install pydicom") from error
        self._path, self._lock = path, Lock()
        self._rescales: list[_Rescale] | None = None  # one for all frames, or one for each
        with _damage_is_told(), path.open("rb") as file:
            self._stamp = _stamp(path)
            # dcmread would inflate all of it, to whatever size
            if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                reason = "a DICOM that is deflated as a whole; unpack it first (dcmconv +te)"
                raise UnusableImageError("other_format", reason)
            self._dataset = dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS])
            self.header = _header(self._dataset)
            self._place, self._vr = _find_pixels(self._dataset, file)
            self._check_frames()

    def png(self, frame: int = 0, window: tuple[float, float] | None = None) -> bytes:
        """One frame as a PNG: grey of 16 bits (8 where no more are stored, or with a window), or RGB.

        The levels that are stored fill the range of the PNG, each keeping one of its own. Those of a CT that says its
        rescale slope and intercept are Hounsfield units, -1024 .. 3071 of them, so that one level means the same in
        all files. A window (centre and width, in units after rescaling, PS3.3 C.11.2.1.2.1) maps its range to 8 bits;
        colours have none. MONOCHROME1 is inverted: white is the largest.

        Raises:
            UnusableImageError: Damaged, compressed so that what is installed cannot decode it, or a CT without
                Hounsfield units that is to have a window.
            OSError: The file cannot be read, or changed since it was opened.
        """
        if window is not None and window[1] < 1:
            raise ValueError(f"the window is {window[1]:g} wide; it must be 1 or more")
        if not 0 <= frame < self.header.frames:
            raise UnusableImageError("damaged_image", f"frame {frame} of a DICOM of {self.header.frames}")
        if _stamp(self._path) != self._stamp:
            raise OSError(f"{self._path} changed since it was opened; pack when nothing writes to the images")
        with _damage_is_told():
            pixels = self._decoded(frame)
            if pixels.ndim == 3:
                if pixels.dtype == np.uint16 and pixels.max() < 256 and self.header.bits_stored <= 8:
                    pixels = pixels.astype(np.uint8)
                return _png(pixels[:, :, ::-1])  # OpenCV's order
            levels, rescale = _levels(self._dataset, pixels), self._rescale(frame)
            if window is None:
                return _png(_full_range(self._dataset, levels, rescale))
            check_window(self.header._replace(hounsfield=rescale.intercept is not None))
            shown = _windowed(rescale.apply(levels), window)
            return _png(255 - shown if self.header.inverted else shown)

    def _check_frames(self) -> None:
        """Raise UnusableImageError for more frames than there can be in a file of its size."""
        frames, size = self.header.frames, self._stamp[0]
        if frames > MAX_FRAMES:
            raise UnusableImageError("too_large", f"a DICOM of {frames:,} frames; up to {MAX_FRAMES:,} are read")
        syntax = self._dataset.file_meta.get("TransferSyntaxUID")
        least = 8 * _ITEM_BYTES  # bits
        if syntax is None or not syntax.is_compressed:
            halved = self._dataset.get("PhotometricInterpretation") == "YBR_FULL_422"
            samples = 2 if halved else _whole(self._dataset, "SamplesPerPixel", default=1)
            least = int(self._dataset.Rows) * int(self._dataset.Columns) * samples
            least *= _whole(self._dataset, "BitsAllocated", default=1)
        if frames > 1 and frames * least > 8 * size:
            reason = f"{frames:,} frames of {-(-least // 8):,} bytes or more in a file of {size:,}"
            raise UnusableImageError("damaged_image", f"a damaged DICOM: {reason}")

    def _decoded(self, frame: int) -> np.ndarray:
        """(h, w) as stored, or (h, w, 3) as RGB; of the file only the frame's bytes are read."""
        from pydicom.pixels import apply_color_lut, as_pixel_options, get_decoder

        syntax = self._dataset.file_meta.get("TransferSyntaxUID")
        if syntax is None:
            raise ValueError("it has no TransferSyntaxUID")
        options = as_pixel_options(self._dataset, pixel_keyword="PixelData", pixel_vr=self._vr)
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                pixels, _ = get_decoder(syntax).as_array(file, index=frame, **options)
            if self._dataset.PhotometricInterpretation == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, self._dataset)
        except (RuntimeError, NotImplementedError) as error:
            if not syntax.is_compressed:
                raise
            reason = (
                f"a DICOM compressed as {syntax.name}, which no installed decoder reads, or damaged: pip install "
                "python-gdcm, or decompress it (gdcmconv --raw)"
            )
            raise UnusableImageError("damaged_image", reason) from error
        return pixels

    def _rescale(self, frame: int) -> _Rescale:
        with self._lock:
            if self._rescales is None:
                self._rescales = _rescales(self._dataset)
                for name in (_SHARED, _PER_FRAME):  # the largest part of a file of many frames
                    self._dataset.pop(name, None)
        if len(self._rescales) == 1:
            return self._rescales[0]
        if frame >= len(self._rescales):
            raise ValueError(f"its {_PER_FRAME} has {len(self._rescales)} items, and there are {self.header.frames}")
        return self._rescales[frame]


def check_window(header: DicomHeader) -> None:
    """Raise UnusableImageError where a window in Hounsfield units would be laid over levels that are none."""
    if header.modality == "CT" and not header.hounsfield and not header.colour:
        raise UnusableImageError(
            "other_format",
            "a CT whose levels are no Hounsfield units, as it has no RescaleIntercept; no window (--dicom-window) fits "
            "it. Pack it without one, or leave it out",
        )


@contextmanager
def _damage_is_told() -> Iterator[None]:
    """Whatever pydicom and the decoders stumble over becomes UnusableImageError; not what the disk does."""
    try:
        yield
    except UnusableImageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnusableImageError("damaged_image", f"a damaged DICOM: {type(error).__name__}: {error}") from error


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _header(dataset: Any) -> DicomHeader:
    missing = [name for name in ("Rows", "Columns", "BitsStored", "PhotometricInterpretation") if name not in dataset]
    if missing:
        raise UnusableImageError("not_an_image", f"a DICOM without an image: it has no {', '.join(missing)}")
    rows, columns, bits = (_whole(dataset, name) for name in ("Rows", "Columns", "BitsStored"))
    samples = _whole(dataset, "SamplesPerPixel", default=1)
    check_size(rows, columns, samples, 2)
    if bits > 16:
        raise UnusableImageError("other_format", f"a DICOM of {bits} bits; up to 16 are read")
    _whole(dataset, "PixelRepresentation", least=0, default=0)
    frames = 1  # also where the number is empty or 0, as some writers have it
    if _stored(dataset, "NumberOfFrames") not in (None, b"0"):
        frames = _whole(dataset, "NumberOfFrames")
    modality, kind = str(dataset.get("Modality") or ""), dataset.PhotometricInterpretation
    return DicomHeader(
        modality, frames, bits, kind == "MONOCHROME1", samples > 1 or kind == "PALETTE COLOR",
        modality == "CT" and _rescale_of_first(dataset).intercept is not None,
    )  # fmt: skip


def _whole(dataset: Any, name: str, least: int = 1, default: int | None = None) -> int:
    """A whole number of the file's; `default` where it is not there."""
    if default is not None and name not in dataset:
        return default
    value = _stored(dataset, name)
    try:
        number = int(dataset[name].value)
    except Exception:
        number = least - 1
    if number < least:
        reason = f"a damaged DICOM: its {name} is {value!r}; it must be a whole number of {least} or more"
        raise UnusableImageError("damaged_image", reason)
    return number


def _stored(dataset: Any, name: str) -> Any:
    """A value as it is in the file, mostly bytes; None where there is none."""
    if name not in dataset:
        return None
    value = dataset.get_item(name).value
    return value.strip(b" \0") or None if isinstance(value, bytes) else value


def _number(dataset: Any, name: str) -> float | None:
    """A number of the file's; None where there is none."""
    value = _stored(dataset, name)
    if value is None:
        return None
    try:
        number = float(dataset[name].value)
    except Exception:
        number = math.nan
    if not math.isfinite(number):
        raise UnusableImageError("damaged_image", f"a damaged DICOM: its {name} is {value!r}; it must be a number")
    return number


def _find_pixels(dataset: Any, file: BinaryIO) -> tuple[int, str | None]:
    """Where the value of the pixels begins, and their VR, from where their tag does."""
    is_implicit, is_little = dataset.original_encoding
    start = file.read(8 if is_implicit else 12)
    if len(start) < 8 or struct.unpack("<HH" if is_little else ">HH", start[:4]) != _PIXELS:
        raise UnusableImageError("not_an_image", "a DICOM without an image: it has no PixelData")
    return file.tell(), None if is_implicit else start[4:6].decode("ascii")


def _own_rescale(dataset: Any) -> _Rescale:
    return _Rescale(_number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept"))


def _rescale_in(groups: Any) -> _Rescale | None:
    """Of an item of functional groups, in which files of several frames have it."""
    found = groups.get("PixelValueTransformationSequence")
    return _own_rescale(found[0]) if found else None


def _shared_rescale(dataset: Any) -> _Rescale:
    shared = dataset.get(_SHARED)
    return (shared and _rescale_in(shared[0])) or _own_rescale(dataset)


def _rescale_of_first(dataset: Any) -> _Rescale:
    """Of the first frame, without a look at all others where it need not be."""
    shared = _shared_rescale(dataset)
    if shared.intercept is not None or not (frames := dataset.get(_PER_FRAME)):
        return shared
    return _rescale_in(frames[0]) or shared


def _rescales(dataset: Any) -> list[_Rescale]:
    """One for all frames, or one for each."""
    shared = _shared_rescale(dataset)
    own = [_rescale_in(groups) for groups in dataset.get(_PER_FRAME) or ()]
    return [one or shared for one in own] if any(own) else [shared]


def _levels(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """(h, w) int64 as stored, without what lies in the bits beyond those that count, such as overlays."""
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation", 0))
    offset = 1 << (bits - 1) if signed else 0
    return ((pixels.astype(np.int64) + offset) & ((1 << bits) - 1)) - offset


def _full_range(dataset: Any, levels: np.ndarray, rescale: _Rescale) -> np.ndarray:
    """(h, w) uint16, or uint8 where no more than 8 bits are stored."""
    bits = int(dataset.BitsStored)
    if dataset.get("Modality") == "CT" and rescale.intercept is not None:
        units = (rescale.apply(levels) - _HOUNSFIELD_LEAST).round().clip(0, _HOUNSFIELD_LEVELS - 1)
        levels, most, full = units.astype(np.int64), _HOUNSFIELD_LEVELS - 1, 65535
    else:
        levels = levels + ((1 << (bits - 1)) if dataset.get("PixelRepresentation", 0) else 0)
        most, full = (1 << bits) - 1, 255 if bits <= 8 else 65535
        if (rescale.slope or 1.0) < 0:
            levels = most - levels
    scaled = (levels * full + most // 2) // most
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        scaled = full - scaled
    return scaled.astype(np.uint8 if full == 255 else np.uint16)


def _windowed(units: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """(h, w) uint8 by DICOM's linear function."""
    centre, width = window
    share = (units - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    done, content = cv2.imencode(".png", np.ascontiguousarray(pixels))
    assert done
    return content.tobytes()
