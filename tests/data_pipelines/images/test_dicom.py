"""DICOM files as images: levels, units, windows, frames, and what cannot be read."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from dicoms import dicom, functional_groups, with_value, without_pixels
from making import encode, picture
from packs import read_back
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from data_pipelines.images.dicom import DicomFile
from data_pipelines.images.pixels import UnusableImageError
from data_pipelines.packing.inspect_images import inspect_images
from data_pipelines.packing.listing import Skipped
from data_pipelines.packing.sources.dicom_files import DicomFiles
from data_pipelines.packing.write import pack


def dicom_to_png(content: bytes, **options) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return DicomFile(Path(file.name)).png(**options)


def shown(content: bytes, **options) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(dicom_to_png(content, **options), np.uint8), cv2.IMREAD_UNCHANGED)


LEVELS = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
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
        shown(without_pixels())


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(dicom(LEVELS))
    (folder / "IM000001").write_bytes(dicom(LEVELS // 2))
    (folder / "1.2.840.7").write_bytes(dicom(LEVELS // 3))
    (folder / "frames.DCM").write_bytes(dicom(np.stack([LEVELS // 5, LEVELS // 7])))
    (folder / "DICOMDIR").write_bytes(without_pixels())
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
        "2 frames of DICOM files of several are images of their own; a share that is held back takes all frames of a "
        "file or none",
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


def rescale(intercept: float, slope: float = 1) -> dict[str, float]:
    return {"RescaleSlope": slope, "RescaleIntercept": intercept}


UNITS = np.array([[-1024, 0, 40, 240]])


@pytest.mark.parametrize("place", ["classic", "shared", "per frame", "shared, but of one frame"])
def test_the_rescale_is_found_wherever_a_file_has_it(place: str) -> None:
    intercepts = [-2000, -2000] if place in ("classic", "shared") else [-2000, -3000]
    pixels = np.stack([UNITS - intercept for intercept in intercepts]).astype(np.uint16)
    tags: dict = {
        "classic": rescale(-2000),
        "shared": {"SharedFunctionalGroupsSequence": [functional_groups(**rescale(-2000))]},
        "per frame": {
            "PerFrameFunctionalGroupsSequence": [functional_groups(**rescale(value)) for value in (-2000, -3000)],
            **rescale(7),
        },
        "shared, but of one frame": {
            "SharedFunctionalGroupsSequence": [functional_groups(**rescale(-2000))],
            "PerFrameFunctionalGroupsSequence": [Dataset(), functional_groups(**rescale(-3000))],
        },
    }[place]  # fmt: skip
    content = dicom(pixels, bits=16, modality="CT", **tags)
    for frame in range(2):
        assert (shown(content, frame=frame) == ((UNITS + 1024) * 65535 + 2047) // 4095).all()
        windowed = shown(content, frame=frame, window=(40.0, 400.0))
        assert windowed[0].tolist() == [0, 102, 128, 255]


def test_a_frame_beyond_its_functional_groups_is_damage() -> None:
    items = [functional_groups(**rescale(-1)), functional_groups(**rescale(-2))]
    content = dicom(np.stack([LEVELS] * 3), modality="CT", PerFrameFunctionalGroupsSequence=items)
    with pytest.raises(UnusableImageError, match="PerFrameFunctionalGroupsSequence has 2 items, and there are 3"):
        dicom_to_png(content, frame=2)


def test_a_negative_slope_of_functional_groups_turns_the_levels() -> None:
    items = [functional_groups(**rescale(0, slope=-1))]
    found = shown(dicom(LEVELS, modality="MR", SharedFunctionalGroupsSequence=items))
    assert (found == shown(dicom(4095 - LEVELS))).all()


COLOUR_NOTE = "1 DICOM file (CT, 8 bits stored): colours as they are"
PALETTE = {
    f"{colour}PaletteColorLookupTable{part}": value
    for colour in ("Red", "Green", "Blue")
    for part, value in (("Descriptor", [256, 0, 8]), ("Data", bytes(range(256))))
}


@pytest.mark.parametrize(
    ("content", "note", "note_of_window"),
    [
        (
            dicom(LEVELS, modality="CT", **rescale(-1024)),
            "1 DICOM file (CT, 12 bits stored): Hounsfield units -1024 .. 3071 spread over 16 bits, each a level of "
            "its own",
            "1 DICOM file (CT, 12 bits stored): 8 bits by the window 40, 400",
        ),
        (
            dicom(LEVELS, modality="CT"),
            "1 DICOM file (CT, 12 bits stored): 16 bits, each of the 4,096 levels one of its own",
            None,
        ),
        (dicom(picture(1), bits=8, modality="CT"), COLOUR_NOTE, f"{COLOUR_NOTE}, which no window applies to"),
        (
            dicom(
                picture(1)[:, :, 0].copy(), bits=8, modality="CT", PhotometricInterpretation="PALETTE COLOR", **PALETTE
            ),
            COLOUR_NOTE,
            f"{COLOUR_NOTE}, which no window applies to",
        ),
    ],
    ids=["CT", "CT without rescale", "RGB", "palette"],
)  # fmt: skip
def test_notes_tell_what_is_done(content: bytes, note: str, note_of_window: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(content)
    assert list_dicoms(tmp_path)[1][:1] == [note]
    found, notes = list_dicoms(tmp_path, window=(40.0, 400.0))
    if note_of_window is None:
        assert isinstance(found, Skipped)
        assert "no window (--dicom-window) fits" in found.reason
        with pytest.raises(UnusableImageError, match="a CT whose levels are no Hounsfield units"):
            dicom_to_png(content, window=(40.0, 400.0))
    else:
        assert notes[:1] == [note_of_window]


def list_dicoms(folder: Path, window: tuple[float, float] | None = None) -> tuple:
    files = DicomFiles(window)
    return files.entries(folder / "a.dcm", "a.dcm"), files.notes()


ONE = dicom(LEVELS, modality="CT", RescaleSlope="1", RescaleIntercept="-1024", NumberOfFrames="1")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("Rows", b"", "its Rows is None; it must be a whole number of 1 or more"),
        ("Columns", b"\0\0", "its Columns is "),
        ("BitsStored", b"\x0c\0\x0c\0", "its BitsStored is "),
        ("SamplesPerPixel", b"", "its SamplesPerPixel is None"),
        ("PixelRepresentation", b"", "its PixelRepresentation is None; it must be a whole number of 0 or more"),
        ("NumberOfFrames", b"ab", "its NumberOfFrames is b'ab'; it must be a whole number of 1 or more"),
        ("NumberOfFrames", b"-1", "its NumberOfFrames is "),
        ("RescaleSlope", b"abcd", "its RescaleSlope is b'abcd'; it must be a number"),
        ("RescaleSlope", b"1\\2 ", "its RescaleSlope is "),
        ("RescaleIntercept", b"nan ", "its RescaleIntercept is "),
        ("BitsAllocated", b"", "a damaged DICOM"),
        ("PhotometricInterpretation", b"", "a damaged DICOM"),
        ("TransferSyntaxUID", b"1.2.3.4\0", "a damaged DICOM"),
    ],
)
def test_a_malformed_attribute_costs_its_file_and_is_named(name: str, value: bytes, told: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.dcm").write_bytes(with_value(ONE, name, value))
    (folder / "good.dcm").write_bytes(ONE)
    result = pack(folder, tmp_path / "out", progress=False)
    assert result["splits"]["train"]["samples"] == 1
    (skipped,) = result["skipped"]
    assert skipped["path"] == "bad.dcm"
    assert told in skipped["reason"]


@pytest.mark.parametrize("value", [b"", b"0 "])
def test_no_number_of_frames_is_one(value: bytes) -> None:
    assert (shown(with_value(ONE, "NumberOfFrames", value)) == shown(ONE)).all()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (dicom(LEVELS, NumberOfFrames=20_000), "20,000 frames of 8,192 bytes or more in a file of "),
        (
            with_value(dicom(LEVELS, syntax=RLELossless, NumberOfFrames=1), "NumberOfFrames", b"20000 "),
            "20,000 frames of 8 bytes or more in a file of ",
        ),
        (dicom(np.zeros((1, 1), np.uint8), bits=8, NumberOfFrames=1 << 30), "up to 131,072 are read"),
        (dicom(LEVELS, syntax=DeflatedExplicitVRLittleEndian), "deflated as a whole; unpack it first"),
    ],
    ids=["more frames than bytes", "more compressed frames than bytes", "more frames than are read", "deflated"],
)
def test_what_a_file_says_is_not_what_it_may_cost(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(content)
    found, _ = list_dicoms(tmp_path)
    assert isinstance(found, Skipped)
    assert told in found.reason


def test_listing_and_one_frame_take_no_memory_for_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom(np.stack([LEVELS // (1 + number) for number in range(1024)])))  # 8 MB
    tracemalloc.start()
    found, _ = list_dicoms(tmp_path)
    first = DicomFile(tmp_path / "a.dcm").png(1023)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1024
    assert first == dicom_to_png(dicom(LEVELS // 1024))
    assert peak < 3 << 20


def test_a_file_is_parsed_once_for_all_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.dcm").write_bytes(dicom(np.stack([LEVELS // (1 + number) for number in range(20)])))
    parsed = []
    read = pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **options: (parsed.append(1), read(*args, **options))[1])
    assert pack(folder, tmp_path / "out", workers=1, progress=False)["splits"]["train"]["samples"] == 40
    assert len(parsed) == 4, "each file once when it is listed, and once when its frames are read"


def test_a_file_that_changes_while_it_is_packed_ends_the_pack(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(np.stack([LEVELS, LEVELS])))
    opened = DicomFile(path)
    path.write_bytes(dicom(np.stack([LEVELS, LEVELS, LEVELS])))
    with pytest.raises(OSError, match="changed since it was opened"):
        opened.png(1)


@pytest.mark.parametrize("name", ["x.dcm", "IM000001", "1.2.840.7"])
def test_the_json_beside_a_dicom_is_its_metadata(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(dicom(np.stack([LEVELS, LEVELS // 2])))
    (folder / f"{name.removesuffix('.dcm')}.json").write_text('{"age": 7}')
    (folder / "other.dcm").write_bytes(dicom(LEVELS // 3))
    pack(folder, tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    told = {image: sample.get("json") for image, sample in found.items()}
    assert told == {
        dicom_to_png(dicom(LEVELS)): {"age": 7},
        dicom_to_png(dicom(LEVELS // 2)): {"age": 7},
        dicom_to_png(dicom(LEVELS // 3)): None,
    }
