"""DICOM files as images: read where images are packed, and packed as PNG, so that no run needs pydicom.

Of a file's attributes only the pixels and what they mean go on; nothing of the patient does.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import cv2
import numpy as np

from data_pipelines.images.pixels import UnusableImageError, check_size

SUFFIXES = ("dcm", "dicom")
_TAGS = (
    "Modality", "RescaleSlope", "RescaleIntercept", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation",
)  # fmt: skip
_HOUNSFIELD_LEAST = -1024  # of CT, which has 4,096 levels from there on
_HOUNSFIELD_LEVELS = 4096


class DicomHeader(NamedTuple):
    """What is known before any pixel is decoded."""

    modality: str
    frames: int
    bits_stored: int
    inverted: bool  # MONOCHROME1: white is zero


def is_dicom(start: bytes) -> bool:
    """Whether a file is DICOM by its first 132 bytes."""
    return start[128:132] == b"DICM"


def look_at_dicom(content: bytes) -> DicomHeader:
    """The header of a file with pixels.

    Raises:
        UnusableImageError: It has none, or they are of a kind that is not read.
        ValueError: pydicom is not installed.
    """
    return _header(_read(content, pixels=False))


def dicom_to_png(content: bytes, frame: int = 0, window: tuple[float, float] | None = None) -> bytes:
    """One frame as a PNG: grey of 16 bits (8 where no more are stored, or with a window), or RGB.

    The levels that are stored fill the range of the PNG, each keeping one of its own. Those of CT are Hounsfield units
    by rescale slope and intercept, -1024 .. 3071 of them, so that one level means the same in all files. A window
    (centre and width, in units after rescaling, PS3.3 C.11.2.1.2.1) maps its range to 8 bits. MONOCHROME1 is
    inverted: white is the largest.

    Raises:
        UnusableImageError: Damaged, without pixels, or compressed so that what is installed cannot decode it.
    """
    from pydicom.pixels import apply_color_lut, pixel_array

    dataset = _read(content, pixels=True)
    header = _header(dataset)
    if window is not None and window[1] < 1:
        raise ValueError(f"the window is {window[1]:g} wide; it must be 1 or more")
    if not 0 <= frame < header.frames:
        raise UnusableImageError("damaged_image", f"frame {frame} of a DICOM of {header.frames}")
    try:
        pixels = pixel_array(dataset, index=frame)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
    except Exception as error:  # whatever the decoders stumble over
        raise UnusableImageError("damaged_image", _why_not(dataset, error)) from error
    if pixels.ndim == 3:
        if pixels.dtype == np.uint16 and pixels.max() < 256 and header.bits_stored <= 8:
            pixels = pixels.astype(np.uint8)
        return _png(pixels[:, :, ::-1])  # OpenCV's order
    return _png(_windowed(dataset, pixels, window) if window is not None else _full_range(dataset, pixels))


def _read(content: bytes, pixels: bool) -> Any:
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError("reading DICOM needs pydicom, which is not installed: pip install '.[dicom]'") from error
    try:
        tags = None if pixels else [*_TAGS]
        return dcmread(io.BytesIO(content), stop_before_pixels=not pixels, specific_tags=tags, force=False)
    except Exception as error:
        raise UnusableImageError("damaged_image", f"a damaged DICOM: {type(error).__name__}: {error}") from error


def _header(dataset: Any) -> DicomHeader:
    missing = [name for name in ("Rows", "Columns", "BitsStored", "PhotometricInterpretation") if name not in dataset]
    if missing:
        raise UnusableImageError("not_an_image", f"a DICOM without an image: it has no {', '.join(missing)}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    check_size(int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1)), 2)
    if int(dataset.BitsStored) > 16:
        raise UnusableImageError("other_format", f"a DICOM of {dataset.BitsStored} bits; up to 16 are read")
    return DicomHeader(
        str(dataset.get("Modality", "")), frames, int(dataset.BitsStored),
        dataset.PhotometricInterpretation == "MONOCHROME1",
    )  # fmt: skip


def _why_not(dataset: Any, error: Exception) -> str:
    syntax = dataset.file_meta.get("TransferSyntaxUID") if "file_meta" in dir(dataset) else None
    if syntax is not None and syntax.is_compressed and isinstance(error, RuntimeError):
        return (
            f"a DICOM compressed as {syntax.name}, which no installed decoder reads: pip install python-gdcm, or "
            "decompress it (gdcmconv --raw)"
        )
    return f"a damaged DICOM: {type(error).__name__}: {error}"


def _levels(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """(h, w) int64 as stored, without what lies in the bits beyond those that count, such as overlays."""
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation", 0))
    offset = 1 << (bits - 1) if signed else 0
    return ((pixels.astype(np.int64) + offset) & ((1 << bits) - 1)) - offset


def _rescaled(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    return _levels(dataset, pixels) * slope + intercept


def _full_range(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """(h, w) uint16, or uint8 where no more than 8 bits are stored."""
    bits = int(dataset.BitsStored)
    if dataset.get("Modality") == "CT" and "RescaleIntercept" in dataset:
        levels = (_rescaled(dataset, pixels) - _HOUNSFIELD_LEAST).round().clip(0, _HOUNSFIELD_LEVELS - 1)
        levels, most, full = levels.astype(np.int64), _HOUNSFIELD_LEVELS - 1, 65535
    else:
        levels = _levels(dataset, pixels)
        levels -= -(1 << (bits - 1)) if dataset.get("PixelRepresentation", 0) else 0
        most, full = (1 << bits) - 1, 255 if bits <= 8 else 65535
        if float(dataset.get("RescaleSlope", 1) or 1) < 0:
            levels = most - levels
    scaled = (levels * full + most // 2) // most
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        scaled = full - scaled
    return scaled.astype(np.uint8 if full == 255 else np.uint16)


def _windowed(dataset: Any, pixels: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """(h, w) uint8 by DICOM's linear function."""
    centre, width = window
    share = (_rescaled(dataset, pixels) - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    shown = (share.clip(0, 1) * 255).round().astype(np.uint8)
    return 255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def _png(pixels: np.ndarray) -> bytes:
    done, content = cv2.imencode(".png", np.ascontiguousarray(pixels))
    assert done
    return content.tobytes()
