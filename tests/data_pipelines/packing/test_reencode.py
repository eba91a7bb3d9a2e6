"""Making images smaller: what comes out, what is left alone, and how close it is to what it was."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from making import encode, picture
from packs import read_back
from PIL import Image

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.images.decode import decode
from data_pipelines.images.sample import Sample
from data_pipelines.packing.reencode import REENCODED, Reencoding, prepare
from data_pipelines.packing.write import pack

TO_64 = Reencoding(64, quality=95, subsampling="4:4:4")


def detailed(height: int = 200, width: int = 300, seed: int = 0) -> np.ndarray:
    """An image with detail at every scale: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / side**0.5
    return (255 * (total - total.min()) / np.ptp(total)).astype(np.uint8)


def decoded(content: bytes) -> np.ndarray:
    """As a run sees it."""
    return decode(Sample("", Path(), content, None))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


def lanczos(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_result_is_close_to_the_exact_resize(format: str) -> None:
    original = encode(detailed(), format, quality=95)
    made = prepare(original, TO_64)
    assert (made.outcome, made.suffix, made.width, made.height) == (REENCODED, "jpg", 96, 64)
    assert psnr(decoded(made.content), lanczos(decoded(original), (96, 64))) > 36


def test_a_large_jpeg_decoded_in_part_is_as_good() -> None:
    """8 times too large, so that the decoder itself makes it 4 times smaller."""
    original = encode(detailed(1024, 1536), "JPEG", quality=95)
    made = prepare(original, Reencoding(128, quality=95, subsampling="4:4:4"))
    reference = lanczos(decoded(original), (192, 128))
    file = io.BytesIO()
    Image.fromarray(reference).save(file, "JPEG", quality=95, subsampling="4:4:4")
    assert psnr(decoded(made.content), reference) > psnr(decoded(file.getvalue()), reference) - 1


def test_quality_and_subsampling_are_those_asked_for() -> None:
    original = encode(detailed(), "PNG")
    made = {
        (quality, subsampling): Image.open(io.BytesIO(prepare(original, Reencoding(64, quality, subsampling)).content))
        for quality in (50, 90)
        for subsampling in ("4:2:0", "4:4:4")
    }
    for (quality, subsampling), image in made.items():
        reference = io.BytesIO()
        Image.new("RGB", (96, 64)).save(reference, "JPEG", quality=quality, subsampling=subsampling)
        expected = Image.open(reference)
        assert image.quantization == expected.quantization  # type: ignore[attr-defined]
        assert image.layer == expected.layer  # type: ignore[attr-defined]
        assert not image.info.get("progressive")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_applied_and_dropped(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    original = encode(detailed(), "JPEG", quality=95, exif=exif)
    made = prepare(original, TO_64)
    upright = decoded(original)
    turned = orientation > 4
    assert (made.width, made.height) == ((64, 96) if turned else (96, 64))
    assert not Image.open(io.BytesIO(made.content)).getexif()
    assert psnr(decoded(made.content), lanczos(upright, (made.width, made.height))) > 36


def test_a_colour_profile_goes_along() -> None:
    original = encode(detailed(), "JPEG", icc_profile=b"a profile", comment=b"secret")
    info = Image.open(io.BytesIO(prepare(original, TO_64).content)).info
    assert info["icc_profile"] == b"a profile"
    assert "comment" not in info
    file = io.BytesIO()
    Image.fromarray(detailed()).convert("CMYK").save(file, "JPEG", icc_profile=b"of inks")
    made = prepare(file.getvalue(), TO_64)
    assert (made.outcome, made.mode) == (REENCODED, "RGB")
    assert "icc_profile" not in Image.open(io.BytesIO(made.content)).info


def sixteen_bits() -> bytes:
    import cv2

    return cv2.imencode(".png", np.random.default_rng(0).integers(0, 1 << 16, (100, 100, 3), dtype=np.uint16))[
        1
    ].tobytes()


def animated(format: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(detailed(100, 100, seed)) for seed in range(2)]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def in_mode(mode: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(detailed(100, 100)).convert("L" if mode.startswith("I") else mode).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (encode(detailed(64, 900), "JPEG"), "small"),
        (in_mode("RGBA"), "transparent"),
        (in_mode("LA"), "transparent"),
        (in_mode("I;16"), "16 bits"),
        (sixteen_bits(), "16 bits"),
        (animated("WEBP"), "several frames"),
        (animated("PNG"), "several frames"),
    ],
)
def test_what_a_jpeg_cannot_hold_keeps_its_bytes(content: bytes, why: str) -> None:
    made = prepare(content, TO_64)
    assert (made.outcome, made.content) == (why, content)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_other_modes_become_colour_or_grey(mode: str) -> None:
    original = in_mode(mode)
    made = prepare(original, TO_64)
    assert (made.outcome, made.mode) == (REENCODED, "RGB" if mode == "P" else "L")
    assert psnr(decoded(made.content), lanczos(decoded(original), (64, 64))) > 30


def test_settings_out_of_range() -> None:
    for settings, message in (
        ({"max_short_side": 4}, "max_short_side is 4 px"),
        ({"max_short_side": 64, "quality": 100}, "quality is 100"),
        ({"max_short_side": 64, "subsampling": "4:1:1"}, "subsampling is '4:1:1'"),
        ({}, "nothing would be re-encoded"),
    ):
        with pytest.raises(ValueError, match=message):
            Reencoding(**settings)  # type: ignore[arg-type]


def test_a_pack_says_what_was_re_encoded(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/large.png").write_bytes(encode(detailed()))
    (tmp_path / "images/small.png").write_bytes(encode(picture(1)))
    (tmp_path / "images/transparent.png").write_bytes(in_mode("RGBA"))
    (tmp_path / "images/cut.jpg").write_bytes(encode(detailed(), "JPEG")[:2000])
    result = pack(tmp_path / "images", tmp_path / "out", reencoding=Reencoding(64), progress=False)
    made = result["reencoding"]
    assert (made["samples"], made["share"]) == (1, 0.333333)
    assert made["kept"] == {"small": 1, "transparent": 1}
    assert result["pack"]["reencoding"]["quality"] == 90
    assert result["images"]["height"] == [20, 64, 100]
    assert [entry["path"] for entry in result["skipped"]] == ["cut.jpg"]  # decoding told what the header does not
    found = read_back(tmp_path / "out", "train")
    assert encode(picture(1)) in found
    assert made["bytes_after"] == sum(map(len, found)) < made["bytes_before"]
    with pytest.raises(FileExistsError, match=r"reencoding is .*'quality': 80"):
        pack(tmp_path / "images", tmp_path / "out", reencoding=Reencoding(64, 80), progress=False)
    everything = Reencoding(everything=True)
    result = pack(tmp_path / "images", tmp_path / "all", reencoding=everything, progress=False)
    assert result["reencoding"]["kept"] == {"transparent": 1}
    assert result["images"]["height"] == [20, 100, 200]


def test_images_beyond_rgb_ride_along(tmp_path: Path) -> None:
    """TIFF and arrays of any channels and depth are packed byte for byte, re-encoding or not."""
    bands = np.random.default_rng(0).integers(0, 1 << 16, (80, 90, 5), dtype=np.uint16)
    tiff, array = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(tiff, bands, photometric="minisblack", planarconfig="contig")
    np.save(array, bands)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.tif").write_bytes(tiff.getvalue())
    (tmp_path / "images/b.npy").write_bytes(array.getvalue())
    for number, settings in enumerate((None, Reencoding(64))):
        result = pack(tmp_path / "images", tmp_path / f"out{number}", reencoding=settings, check="full", progress=False)
        assert result["num_skipped"] == 0
        assert len(result["mean"]) == 5
        with open_dataset(tmp_path / f"out{number}") as dataset:
            stored = {dataset.read(place).image for place in range(2)}
        assert stored == {tiff.getvalue(), array.getvalue()}
    assert result["reencoding"]["kept"] == {"NPY": 1, "TIFF": 1}
