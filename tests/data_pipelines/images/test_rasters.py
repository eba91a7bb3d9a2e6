"""16-bit PNG and `.npy` arrays, and the matching of depths and channels between files and runs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from making import bands, deep_png, encode, npy, picture, tiff
from PIL import Image

from data_pipelines.images import pixels as pixels_module
from data_pipelines.images.decode import BadSampleError, decode, look
from data_pipelines.images.sample import Sample

DEEP = bands(1)
RGB = DEEP[:, :, :3]
HIGH_BYTES = (RGB >> 8).astype(np.uint8)


def decoded(content: bytes, channels: int | None, bits: int | None) -> np.ndarray:
    return decode(Sample("the-key", Path("train-000003.tar"), content, None), channels, bits)


def refused(content: bytes, channels: int | None, bits: int | None = 16) -> str:
    with pytest.raises(BadSampleError) as error:
        decoded(content, channels, bits)
    assert error.value.key == "the-key"
    return error.value.reason


def test_png_of_16_bits() -> None:
    np.testing.assert_array_equal(decoded(deep_png(RGB), 3, 16), RGB)
    np.testing.assert_array_equal(decoded(deep_png(DEEP[:, :, 0]), 1, 16)[:, :, 0], DEEP[:, :, 0])
    clear = DEEP[:, :, :4].copy()
    clear[:5, :, 3] = 0
    clear[5:, :, 3] = 65535
    np.testing.assert_array_equal(decoded(deep_png(clear), 4, 16), clear)
    on_black = decoded(deep_png(clear), 3, 16)
    assert not on_black[:5].any()
    np.testing.assert_array_equal(on_black[5:], RGB[5:])


@pytest.mark.parametrize(
    ("content", "same_in_8"),
    [
        (tiff(RGB, photometric="rgb"), HIGH_BYTES),
        (npy(RGB), HIGH_BYTES),
        (deep_png(RGB), HIGH_BYTES),
        (encode(HIGH_BYTES), HIGH_BYTES),
        (tiff(HIGH_BYTES), HIGH_BYTES),
        (npy(HIGH_BYTES), HIGH_BYTES),
    ],
)
def test_every_depth_and_channel_count_a_run_may_want(content: bytes, same_in_8: np.ndarray) -> None:
    np.testing.assert_array_equal(decoded(content, 3, 8), same_in_8)
    wide = decoded(content, 3, 16)
    assert wide.dtype == np.uint16
    np.testing.assert_array_equal(wide >> 8, same_in_8)
    if look(content).bits == 8:
        np.testing.assert_array_equal(wide, same_in_8 * np.uint16(257))  # 255 becomes 65535
    for bits, found in ((8, same_in_8), (16, wide)):
        luma = found.astype(float) @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(decoded(content, 1, bits)[:, :, 0], luma, atol=1)
    assert decoded(content, None, None).shape == (20, 24, 3)
    assert refused(content, 13) in (
        "the image has 3 channels and data.channels is 13",
        "an npy of 20x24x3, and neither its first nor its last axis is data.channels, 13",
    )


def test_grey_is_repeated_and_luma_is_pillows() -> None:
    for content in (deep_png(DEEP[:, :, 0]), tiff(DEEP[:, :, 0]), npy(DEEP[:, :, 0]), npy(DEEP[None, :, :, 0])):
        np.testing.assert_array_equal(decoded(content, 3, 16), np.repeat(DEEP[:, :, :1], 3, axis=2))
        assert decoded(content, None, None).shape == (20, 24, 1)
    expected = np.asarray(Image.fromarray(picture(2)).convert("L"))
    np.testing.assert_array_equal(decoded(tiff(picture(2)), 1, 8)[:, :, 0], expected)
    np.testing.assert_array_equal(decoded(encode(picture(2)), 1, 8)[:, :, 0], expected)


def test_opacity_in_8_bits_may_be_a_channel() -> None:
    clear = np.dstack([picture(1), np.full((20, 24), 128, np.uint8)])
    np.testing.assert_array_equal(decoded(encode(clear), 4, 8), clear)
    grey = np.ascontiguousarray(clear[:, :, [0, 3]])
    np.testing.assert_array_equal(decoded(encode(grey), 2, 8), grey)
    assert "3 channels and data.channels is 4" in refused(encode(picture(1), "JPEG"), 4, 8)


def test_orientation_of_a_deep_png_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    file = io.BytesIO()
    Image.fromarray(DEEP[:, :, 0]).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decoded(file.getvalue(), 1, 16)[:, :, 0], np.rot90(DEEP[:, :, 0], -1))


def with_exif(content: bytes, *chunks: bytes) -> bytes:
    """A PNG with eXIf chunks behind its header."""
    made = [
        struct.pack(">I", len(chunk)) + b"eXIf" + chunk + struct.pack(">I", zlib.crc32(b"eXIf" + chunk))
        for chunk in chunks
    ]
    return content[:33] + b"".join(made) + content[33:]


def oriented(value: int) -> bytes:
    """EXIF of an orientation alone."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, value, 0)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (oriented(6), 6),
        (oriented(9), 1),
        (b"no TIFF at all", 1),
        (b"", 1),
        (oriented(6)[:9], 1),
        (b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 2, 400, 1 << 30, 0), 1),
    ],
    ids=["turned", "out of range", "no TIFF", "empty", "cut short", "text beyond its end"],
)
def test_damaged_exif_is_no_reason_against_the_pixels(deep: bool, exif: bytes, orientation: int) -> None:
    pixels = DEEP[:, :, 0] if deep else (DEEP[:, :, 0] >> 8).astype(np.uint8)
    found = decoded(with_exif(encode(pixels), exif), 1, 16 if deep else 8)[:, :, 0]
    np.testing.assert_array_equal(found, np.rot90(pixels, -1) if orientation == 6 else pixels)


def test_of_many_exif_chunks_the_first_alone_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = Image.Exif.load
    monkeypatch.setattr(Image.Exif, "load", lambda *arguments: (loaded.append(1), load(*arguments))[1])
    content = with_exif(encode(DEEP[:, :, 0]), *[oriented(6)] + [oriented(3)] * 50)
    np.testing.assert_array_equal(decoded(content, 1, 16)[:, :, 0], np.rot90(DEEP[:, :, 0], -1))
    assert len(loaded) == 1


def test_a_png_with_chunks_that_libpng_complains_of_is_read_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.fromarray(DEEP[:, :, 0]).save(file, "PNG")
    content = file.getvalue()
    chunk = b"iCCP" + b"no profile"
    odd = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    pixels = decoded(content[:33] + odd + content[33:], 1, 16)
    assert np.array_equal(pixels, DEEP[:, :, :1])
    assert "pixels" in refused(content[:16] + png_header(2_000_000, 1) + content[33:], 1)
    assert capfd.readouterr().err == ""


def png_header(width: int, height: int) -> bytes:
    """What follows `IHDR`, for 16-bit grey."""
    fields = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return fields + struct.pack(">I", zlib.crc32(b"IHDR" + fields))


def test_which_axis_of_an_array_are_the_channels() -> None:
    first = np.ascontiguousarray(np.moveaxis(DEEP, 2, 0))
    for array in (DEEP, first, np.asfortranarray(DEEP), DEEP.astype(">u2")):
        np.testing.assert_array_equal(decoded(npy(array), 13, 16), DEEP)
        assert decoded(npy(array), None, None).shape == (20, 24, 13)
        header = look(npy(array))
        assert (header.width, header.height, header.channels, header.bits) == (24, 20, 13, 16)
    # a picture 13 px wide: only its other axis is 5
    narrow = DEEP[:, :13, :5]
    np.testing.assert_array_equal(decoded(npy(narrow), 5, 16), narrow)
    assert "may be (h, w, c) as well as (c, h, w) with c = 13" in refused(npy(DEEP[:13, :, :]), 13)
    assert "neither its first nor its last axis is data.channels, 4" in refused(npy(DEEP), 4)
    assert look(npy(DEEP[:13])).channels is None
    assert "13x24x13" in refused(npy(DEEP[:13]), None)


def test_other_arrays_are_refused_in_words() -> None:
    for array, reason in (
        (DEEP.astype(np.float32), "'<f4'; images are uint8 or uint16"),
        (DEEP.astype(np.int16), "'<i2'"),
        (DEEP.astype(bool), "'|b1'"),
        (DEEP[0, 0], "an npy of 13; images are"),
        (DEEP[None, None], "1x1x20x24x13"),
        (DEEP[:0], "nothing in it"),
        (np.zeros((2, 2), dtype=[("a", "u1")]), "records or objects"),
    ):
        assert reason in refused(npy(array), 13)
    file = io.BytesIO()
    np.save(file, np.array([{}, 2], dtype=object), allow_pickle=True)
    assert "'|O'" in refused(file.getvalue(), 13)


def test_sizes_that_cannot_be_meant_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    content = npy(DEEP).replace(b"(20, 24, 13)", b"(99999999, 9999, 13)")
    assert "pixels are more than" in refused(content, 13)
    assert "has 18720 bytes of values, and there are 12480" in refused(
        npy(DEEP).replace(b"(20, 24, 13)", b"(30, 24, 13)"), 13
    )
    monkeypatch.setattr(pixels_module, "MAX_PIXELS", 100)
    for content in (npy(RGB), tiff(RGB), deep_png(RGB)):
        assert "24x20 pixels are more than 100" in refused(content, 3)


@pytest.mark.parametrize("content", [npy(RGB), deep_png(RGB), deep_png(DEEP[:, :, 0])])
def test_damage_raises_nothing_else(content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    for length in range(0, len(content), max(1, len(content) // 60)):
        refused(content[:length], 3)
    count = 0
    for _ in range(400):
        damaged = np.frombuffer(content, dtype=np.uint8).copy()
        damaged[draw.integers(min(len(content), draw.choice([60, len(content)])), size=2)] ^= draw.integers(
            1, 256, 2, dtype=np.uint8
        )
        try:
            decoded(damaged.tobytes(), 3, 16)
        except BadSampleError:
            count += 1
    assert count > 50
    assert not capfd.readouterr().err  # libpng would write there
