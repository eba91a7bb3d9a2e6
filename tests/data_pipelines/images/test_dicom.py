"""DICOM files as images: levels, units, windows, frames, and what cannot be read."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from making import encode, picture
from packs import read_back
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from data_pipelines.images.dicom import dicom_to_png
from data_pipelines.images.pixels import UnusableImageError
from data_pipelines.packing.inspect_images import inspect_images
from data_pipelines.packing.write import pack


def dicom(pixels: np.ndarray, *, bits: int = 12, modality: str = "CR", syntax=ExplicitVRLittleEndian, **tags) -> bytes:
    """A file of (h, w) grey, (frames, h, w), or (h, w, 3) uint8 as RGB."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
    dataset = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
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
    dataset.PixelData = pixels.tobytes()
    if syntax.is_compressed and syntax == RLELossless:
        dataset.compress(syntax)
    elif syntax.is_compressed:
        from pydicom.encaps import encapsulate

        dataset.PixelData, dataset["PixelData"].is_undefined_length = encapsulate([b"\xff\x4f broken"]), True
        meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def shown(content: bytes, **options) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(dicom_to_png(content, **options), np.uint8), cv2.IMREAD_UNCHANGED)


LEVELS = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_all_levels_of_12_bits_are_kept_over_16(syntax) -> None:
    found = shown(dicom(LEVELS, syntax=syntax))
    assert (found.dtype, found[0, 0], found[-1, -1]) == (np.uint16, 0, 65535)
    assert len(np.unique(found)) == 4096
    assert (found == (LEVELS.astype(np.int64) * 65535 + 2047) // 4095).all()


def test_white_is_zero_is_inverted() -> None:
    inverted = shown(dicom(LEVELS, PhotometricInterpretation="MONOCHROME1"))
    assert (inverted == 65535 - shown(dicom(LEVELS))).all()
    window = {"window": (2048.0, 4096.0)}
    assert (shown(dicom(LEVELS, PhotometricInterpretation="MONOCHROME1"), **window)
            == 255 - shown(dicom(LEVELS), **window)).all()  # fmt: skip


def test_a_hounsfield_unit_is_one_level_however_it_is_stored() -> None:
    units = np.array([[-2000, -1024, -1000, 0], [40, 1000, 3071, 5000]])
    unsigned = dicom((units + 2048).astype(np.uint16), bits=16, modality="CT", RescaleSlope=1, RescaleIntercept=-2048)
    signed = dicom(units.astype(np.int16), bits=16, modality="CT", RescaleSlope=1, RescaleIntercept=0)
    expected = ((units + 1024).clip(0, 4095) * 65535 + 2047) // 4095
    assert (shown(unsigned) == expected).all()
    assert (shown(signed) == expected).all()


def test_a_window_is_dicoms_linear_function() -> None:
    units = np.array([[-161, -160, 40, 239, 240]], dtype=np.int16)
    content = dicom(units, bits=16, modality="CT", RescaleSlope=1, RescaleIntercept=0)
    found = shown(content, window=(40.0, 400.0))
    expected = [max(0.0, min(1.0, (x - 39.5) / 399 + 0.5)) * 255 for x in (-161, -160, 40, 239, 240)]
    assert found.dtype == np.uint8
    assert found[0].tolist() == np.round(expected).tolist()


def test_signed_levels_and_bits_beyond_those_stored() -> None:
    signed = shown(dicom(np.array([[-2048, 0, 2047]], dtype=np.int16), bits=12))
    assert signed[0].tolist() == [0, 32776, 65535]
    overlay = shown(dicom(np.array([[0xF000, 0x0FFF, 0xF800]], dtype=np.uint16), bits=12))
    assert overlay[0].tolist() == [0, 65535, 32776]


def test_8_bits_and_colour() -> None:
    grey = picture(0)[:, :, 0].copy()
    assert (shown(dicom(grey, bits=8)) == grey).all()
    assert (shown(dicom(picture(1), bits=8))[:, :, ::-1] == picture(1)).all()


def test_what_cannot_be_read_says_why() -> None:
    with pytest.raises(UnusableImageError, match="JPEG 2000"):
        shown(dicom(LEVELS, syntax=JPEG2000Lossless))
    with pytest.raises(UnusableImageError, match="a damaged DICOM"):
        shown(dicom(LEVELS)[:-900])
    with pytest.raises(UnusableImageError, match="without an image: it has no Rows"):
        shown(dicom(LEVELS, Rows=None) if False else _without_pixels())


def _without_pixels() -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = io.BytesIO()
    FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128).save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(dicom(LEVELS))
    (folder / "IM000001").write_bytes(dicom(LEVELS // 2))
    (folder / "1.2.840.7").write_bytes(dicom(LEVELS // 3))
    (folder / "frames.DCM").write_bytes(dicom(np.stack([LEVELS // 5, LEVELS // 7])))
    (folder / "DICOMDIR").write_bytes(_without_pixels())
    (folder / "no.dcm").write_bytes(b"text")
    (folder / "README").write_text("about")
    (folder / "plain.png").write_bytes(encode(picture(0)))
    return folder


def test_dicom_files_are_packed_by_suffix_and_by_content(series: Path, tmp_path: Path) -> None:
    result = pack(series, tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    expected = {dicom_to_png(dicom(LEVELS // part)) for part in (1, 2, 3, 5, 7)} | {encode(picture(0))}
    assert found.keys() == expected
    assert sorted(entry["path"] for entry in result["skipped"]) == ["DICOMDIR", "no.dcm"]
    assert result["notes"][:2] == [
        "4 DICOM files (CR, 12 bits stored): 16 bits, each of the 4,096 levels one of its own",
        "2 frames of DICOM files of several are images of their own",
    ]
    assert not any(b"Doe" in path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file())
    assert inspect_images(series).number == 6


def test_dicom_files_of_a_list_with_a_window(series: Path, tmp_path: Path) -> None:
    (series / "list.csv").write_text("path,label\na.dcm,x\nframes.DCM,y\nIM000001,x\n")
    result = pack(series / "list.csv", tmp_path / "out", dicom_window=(2048.0, 4096.0), progress=False)
    found = read_back(tmp_path / "out", "train")
    assert found[dicom_to_png(dicom(LEVELS), window=(2048.0, 4096.0))]["label"] == 0
    assert sorted(sample["label"] for sample in found.values()) == [0, 0, 1, 1]
    assert result["notes"][0] == "3 DICOM files (CR, 12 bits stored): 8 bits by the window 2048, 4096"
