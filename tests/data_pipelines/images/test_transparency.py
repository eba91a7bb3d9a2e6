"""Transparency of every kind is put on black: as a channel, by a palette, and by one colour that stands for it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import bands, encode, picture, tiff
from PIL import Image

from data_pipelines.datasets.statistics import Kind, measure
from data_pipelines.images.decode import decode, decode_picture, look
from data_pipelines.images.sample import Sample
from data_pipelines.images.validate import validate
from data_pipelines.packing.reencode import Reencoding, prepare

CLEAR = np.arange(24) < 10  # columns that are transparent
RGB = picture(1)


def sample(content: bytes) -> Sample:
    return Sample("the-key", Path("train-000003.tar"), content, None)


def png(rows: np.ndarray, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of (h, bytes of a row), packed already."""
    height = len(rows)
    width = 8 * rows.shape[1] // (depth * {0: 1, 2: 3, 3: 1}[kind])
    packed = np.hstack([np.zeros((height, 1), np.uint8), rows]).tobytes()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(text)) + name + text + struct.pack(">I", zlib.crc32(name + text)) for name, text in parts
    )


def keyed(channels: int, depth: int) -> tuple[bytes, np.ndarray]:
    """A PNG of (h, w, channels) of which one colour is transparent in `CLEAR`, and what it is, that colour 0."""
    levels = (1 << depth) - 1
    pixels = np.random.default_rng(depth).integers(0, levels, (20, 24, channels))  # never the highest
    colour = np.array([levels, 200 % levels, 100 % levels])[:channels]
    pixels[:, CLEAR] = colour
    if depth == 16:
        rows = pixels.astype(">u2").reshape(20, -1).view(np.uint8)
    else:
        bits = (pixels.reshape(20, -1, 1) >> np.arange(depth)[::-1]) & 1
        rows = np.packbits(bits.reshape(20, -1).astype(np.uint8), axis=1)
    content = png(rows, depth, 0 if channels == 1 else 2, (b"tRNS", struct.pack(f">{channels}H", *colour)))
    scaled = pixels if depth == 16 else pixels * 255 // levels
    scaled[:, CLEAR] = 0
    return content, scaled


@pytest.mark.parametrize(("channels", "depth"), [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (3, 8), (3, 16)])
def test_a_colour_that_stands_for_transparency_is_put_on_black(channels: int, depth: int) -> None:
    content, expected = keyed(channels, depth)
    bits = 16 if depth == 16 else 8
    np.testing.assert_array_equal(decode(sample(content), channels, bits), expected)
    assert not decode(sample(content), 4 - channels, bits)[:, CLEAR].any(), "as grey, or as RGB"
    assert decode(sample(content), None, None).shape[2] == channels
    with_opacity = decode(sample(content), channels + 1, bits)
    assert not with_opacity[:, CLEAR, channels].any()
    assert (with_opacity[:, ~CLEAR, channels] == (1 << bits) - 1).all()
    assert "transparent" in validate(content, "png").notes
    assert look(content).transparent
    assert prepare(content, Reencoding(everything=True)).content == content, "no JPEG could hold it"


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_may_be_transparent_in_part(depth: int) -> None:
    count = min(1 << depth, 40)
    colours = np.random.default_rng(depth).integers(1, 256, (count, 3), dtype=np.uint8)
    opacity = np.full(count, 255, np.uint8)
    opacity[0] = 0
    indices = np.random.default_rng(1).integers(1, count, (20, 24))
    indices[:, CLEAR] = 0
    bits = (indices.reshape(20, -1, 1) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(20, -1).astype(np.uint8), axis=1)
    content = png(rows, depth, 3, (b"PLTE", colours.tobytes()), (b"tRNS", opacity[:1].tobytes()))
    expected = colours[indices]
    expected[:, CLEAR] = 0
    np.testing.assert_array_equal(decode(sample(content)), expected)
    np.testing.assert_array_equal(decode(sample(content), 4)[:, :, 3], np.where(CLEAR, 0, 255)[None].repeat(20, 0))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_opacity_is_put_on_black_in_every_format_that_has_it(format: str) -> None:
    alpha = np.where(CLEAR, 0, 255).astype(np.uint8)[None].repeat(20, 0)
    content = saved(Image.fromarray(np.dstack([RGB, alpha])), format, lossless=True)
    np.testing.assert_array_equal(decode(sample(content)), np.where(CLEAR[None, :, None], 0, RGB))
    assert validate(content, channels=3).notes == ("transparent",)


def test_a_gif_is_refused_by_name_whether_transparent_or_not() -> None:
    content = saved(Image.fromarray(RGB).quantize(8), "GIF", transparency=0)
    assert validate(content, "gif", channels=3).case == "other_format"


INFRARED = bands(1, 4)  # red, green, blue and a smooth band


@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", None])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fourth_band_that_is_tagged_as_opacity_is_told(extra: str | None, dtype: type) -> None:
    """tifffile tags the fourth channel so unless told otherwise."""
    pixels = INFRARED if dtype == np.uint16 else (INFRARED >> 8).astype(np.uint8)
    content = tiff(pixels, photometric="rgb", **({"extrasamples": [extra]} if extra else {}))
    np.testing.assert_array_equal(decode(sample(content), 4, None), pixels)
    assert decode_picture(sample(content), 4, bits=None).notes == ()
    assert decode_picture(sample(content), 3, bits=None).notes == ("odd_opacity",)
    assert "odd_opacity" in validate(content, "tif", channels=3).notes
    assert "odd_opacity" in validate(content, "tif").notes
    assert "odd_opacity" not in validate(content, "tif", channels=4).notes


def test_a_fourth_band_in_a_png_is_told_too() -> None:
    for content in (encode((INFRARED >> 8).astype(np.uint8)), saved(Image.fromarray(RGB).convert("LA"), "PNG")):
        expected = ("odd_opacity",) if look(content).channels == 3 else ()
        assert decode_picture(sample(content), 3).notes == expected
    with_soft_border = np.dstack([RGB, np.where(CLEAR, 0, 255)[None].repeat(20, 0)]).astype(np.uint8)
    with_soft_border[:, 9:11, 3] = 128
    assert decode_picture(sample(encode(with_soft_border)), 3).notes == ()


def test_five_bands_are_five_whatever_they_are_tagged_as() -> None:
    pixels = bands(2, 5)
    content = tiff(pixels, photometric="rgb", extrasamples=["unassalpha", "unspecified"])
    np.testing.assert_array_equal(decode(sample(content), 5, 16), pixels)
    assert look(content).channels == 5


def test_statistics_of_a_fourth_band_are_not_multiplied_when_it_is_counted_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = tiff(INFRARED, photometric="rgb")
    counted = measure(lambda number: sample(content), [0], Kind(4, 16), 1)
    np.testing.assert_allclose(counted.mean, INFRARED.mean((0, 1)) / 65535, atol=1e-6)
    assert not caplog.records
    measure(lambda number: sample(content), [0], Kind(3, 16), 1)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("1 of 1 images have an opacity that is neither nothing nor full in most places")
    assert "--channels 4" in told
