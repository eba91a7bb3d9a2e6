"""DICOM files for tests."""

from __future__ import annotations

import io
import struct

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, RLELossless, generate_uid


def dicom(pixels: np.ndarray, *, bits: int = 12, modality: str = "CR", syntax=ExplicitVRLittleEndian, **tags) -> bytes:
    """A file of (h, w) grey, (frames, h, w), or (h, w, 3) uint8 as RGB."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
    is_little = syntax != ExplicitVRBigEndian
    dataset = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128, is_little_endian=is_little)
    is_colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    dataset.Rows, dataset.Columns = pixels.shape[:2] if is_colour else pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3, "RGB") if is_colour else (1, "MONOCHROME2")
    if is_colour:
        dataset.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * pixels.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.Modality, dataset.PatientName = modality, "Doe^Jane"
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = (pixels if is_little else pixels.byteswap()).tobytes()
    if syntax.is_compressed and syntax == RLELossless:
        dataset.compress(syntax)
    elif syntax.is_compressed:
        from pydicom.encaps import encapsulate

        dataset.PixelData, dataset["PixelData"].is_undefined_length = encapsulate([b"\xff\x4f broken"]), True
        meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def without_pixels() -> bytes:
    """A file such as a DICOMDIR."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = io.BytesIO()
    FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128).save_as(file, enforce_file_format=True)
    return file.getvalue()


def with_value(content: bytes, name: str, value: bytes) -> bytes:
    """A file of explicit VR, little endian, with other bytes for the value of an element."""
    tag = Tag(name)
    place = content.index(struct.pack("<HH", tag.group, tag.element), 132)
    (length,) = struct.unpack_from("<H", content, place + 6)
    return content[: place + 6] + struct.pack("<H", len(value)) + value + content[place + 8 + length :]


def functional_groups(**values: float) -> Dataset:
    """An item of functional groups that tells a rescale, as of files of several frames."""
    rescale, groups = Dataset(), Dataset()
    for name, value in values.items():
        setattr(rescale, name, value)
    groups.PixelValueTransformationSequence = [rescale]
    return groups
