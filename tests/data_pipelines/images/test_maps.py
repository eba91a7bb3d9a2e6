"""Masks and depths: the numbers that are stored, whatever the file; what is none is refused in words."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from making import deep_png, encode, npy, picture, tiff
from PIL import Image

from data_pipelines.images.maps import (
    BadMapError,
    decode_depth,
    decode_mask,
    encode_map,
    ignored_level,
    problems_of,
    read_map,
    resized_nearest,
    upright_size,
)

CLASSES = np.random.default_rng(0).integers(0, 4, (9, 13)).astype(np.uint8)


def grey_png(levels: np.ndarray, bits: int) -> bytes:
    """A PNG of few bits of grey, which Pillow does not write: the palette's, its type of colour changed."""
    rows = np.zeros((levels.shape[0], -(-levels.shape[1] * bits // 8)), dtype=np.uint8)
    for (y, x), level in np.ndenumerate(levels):
        rows[y, x * bits // 8] |= level << (8 - bits - x * bits % 8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text)) for kind, text in parts
    )


def palette_png(places: np.ndarray) -> bytes:
    image = Image.fromarray(places, "P")
    image.putpalette([7, 99, 3, 200, 0, 0, 1, 1, 1, 90, 90, 90])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_of_few_bits_are_not_stretched(bits: int) -> None:
    levels = np.minimum(CLASSES, (1 << bits) - 1)
    np.testing.assert_array_equal(decode_mask(grey_png(levels, bits)), levels)


def test_a_palette_gives_its_places_and_16_bits_all_levels() -> None:
    np.testing.assert_array_equal(decode_mask(palette_png(CLASSES)), CLASSES)
    deep = CLASSES.astype(np.uint16) * 20_001
    found = decode_mask(deep_png(deep))
    np.testing.assert_array_equal(found, deep)
    assert (ignored_level(found), ignored_level(CLASSES)) == (65535, 255)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encode(picture(1)), "red, green and blue, and a mask has one number a pixel"),
        (encode(CLASSES, "JPEG"), "lossy format"),
        (encode(CLASSES)[:-30], "truncated|Truncated|damaged|broken|unrecognized"),
        (b"", "no PNG"),
        (encode(CLASSES)[:18] + b"\xff\xff\xff\xff" + encode(CLASSES)[22:], "pack a smaller copy"),
    ],
)
def test_what_is_no_mask_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(BadMapError, match=words):
        read_map("mask", content, None, "sample 7")


def test_another_size_than_the_image_is_refused_with_both() -> None:
    with pytest.raises(BadMapError, match="mask of sample 7 is 13x9 px and its image 24x20"):
        read_map("mask", encode(CLASSES), (20, 24), "sample 7")
    assert problems_of({"mask": encode(CLASSES)}, encode(picture(1)))
    assert problems_of({"mask": encode(picture(1)[..., 0])}, encode(picture(1))) == ()


def test_depths_are_levels_without_zero_or_finite_numbers() -> None:
    levels = CLASSES.astype(np.uint16) * 1000
    found = decode_depth(deep_png(levels))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.where(levels == 0, np.nan, levels))
    values = np.linspace(-1, 1, 117).reshape(9, 13)
    values[2, 3], values[4, 5] = np.inf, np.nan
    for array in (values, values.astype(np.float32)[None], values.astype(">f4")[..., None], np.asfortranarray(values)):
        found = decode_depth(npy(array))
        np.testing.assert_array_equal(np.isnan(found), ~np.isfinite(values))
        np.testing.assert_allclose(found[np.isfinite(values)], values[np.isfinite(values)], rtol=1e-6)
    for array, words in ((values[None, None], "a value for each pixel"), (np.zeros((9, 13), complex), "real numbers")):
        with pytest.raises(BadMapError, match=words):
            read_map("depth", npy(array), None, "sample 7")
    with pytest.raises(BadMapError, match="palette"):
        read_map("depth", palette_png(CLASSES), None, "sample 7")


@pytest.mark.parametrize("size", [(4, 5), (9, 13), (18, 39), (10, 7)])
def test_resizing_takes_the_pixels_that_pillow_takes(size: tuple[int, int]) -> None:
    expected = Image.fromarray(CLASSES).resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resized_nearest(CLASSES, size), np.asarray(expected))


@pytest.mark.parametrize("values", [CLASSES, CLASSES.astype(np.uint16) * 300, CLASSES.astype(np.float32) + 0.5])
def test_what_is_written_is_read(values: np.ndarray) -> None:
    content, ending = encode_map(values)
    assert ending == ("npy" if values.dtype == np.float32 else "png")
    np.testing.assert_array_equal((decode_depth if ending == "npy" else decode_mask)(content), values)


def test_the_size_of_an_image_is_that_of_the_upright_one() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert upright_size(encode(picture(1), "JPEG")) == (20, 24)
    assert upright_size(encode(picture(1), "JPEG", exif=exif)) == (24, 20)
    assert upright_size(tiff(picture(1))) == (20, 24)
    assert upright_size(npy(np.zeros((3, 20, 24), np.uint8))) == (20, 24)
