"""PNG files read without Pillow: its pixels, or none."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_pipelines.images.plain_png import read_plain_png
from data_pipelines.native import BUILT

pytestmark = pytest.mark.skipif(not BUILT, reason="the kernel is not built")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def filtered(pixels: np.ndarray, filters: list[int]) -> bytes:
    """Rows behind these filters, by the formulas of the standard."""
    height, width, channels = pixels.shape
    rows, above, out = pixels.reshape(height, -1).astype(int), np.zeros(width * channels, int), b""
    for row, filter in zip(rows, filters, strict=True):
        left = np.concatenate([np.zeros(channels, int), row[:-channels]])
        corner = np.concatenate([np.zeros(channels, int), above[:-channels]])
        estimate = left + above - corner
        distances = np.abs(np.stack([estimate - left, estimate - above, estimate - corner]))
        paeth = np.choose(distances.argmin(axis=0), [left, above, corner])
        guess = [0 * row, left, above, (left + above) // 2, paeth][min(filter, 4)]
        out += bytes([filter]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        above = row
    return out


END = chunk(b"IEND", b"")


def read(content: bytes) -> np.ndarray | None:
    return read_plain_png(content, 10_000)


def png(pixels: np.ndarray, raw: bytes, before: bytes = b"", pieces: int = 1, end: bytes = END) -> bytes:
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    packed = zlib.compress(raw)
    cuts = [len(packed) * piece // pieces for piece in range(pieces + 1)]
    data = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in itertools.pairwise(cuts))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + data + end


def by_pillow(content: bytes) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (13, 1), (29, 31)])
def test_pixels_are_pillows(channels: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(channels)
    pixels = rng.integers(0, 256, (*shape, channels), dtype=np.uint8)
    for pieces, before in ((1, b""), (3, chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"pHYs", bytes(9)))):
        for filters in ([kind] * shape[0] for kind in range(5)):
            content = png(pixels, filtered(pixels, filters), before, pieces)
            found = read(content)
            assert found is not None
            np.testing.assert_array_equal(found, pixels)
            np.testing.assert_array_equal(by_pillow(content), pixels)
    mixed = png(pixels, filtered(pixels, rng.integers(0, 5, shape[0]).tolist()))
    np.testing.assert_array_equal(read(mixed), by_pillow(mixed))


def test_what_is_more_than_pixels_is_left_to_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image, text = Image.fromarray(pixels), PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (image, {"exif": exif}), (image, {"pnginfo": text}), (image, {"transparency": (0, 0, 0)}),
        (image.convert("RGBA"), {}), (image.convert("LA"), {}), (image.quantize(16), {}), (image.convert("1"), {}),
        (Image.fromarray(pixels[:, :, 0].astype(np.uint16)), {}),
        (image, {"save_all": True, "append_images": [image.rotate(90)]}),
    ]  # fmt: skip
    for shown, options in kinds:
        file = io.BytesIO()
        shown.save(file, "PNG", **options)
        assert read(file.getvalue()) is None
    file = io.BytesIO()
    image.save(file, "PNG")
    np.testing.assert_array_equal(read(file.getvalue()), pixels)


def test_damage_is_left_to_pillow() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    raw = filtered(pixels, [4] * 9)
    good = png(pixels, raw)
    for cut in range(len(good)):
        assert read(good[:cut]) is None
        damaged = bytearray(good)
        damaged[cut] ^= 0x55
        assert read(bytes(damaged)) is None
    np.testing.assert_array_equal(read(good + b"more"), pixels)
    for wrong in (raw[:-1], raw + b"\0", b"\5" + raw[1:]):  # too few, too many, no such filter
        assert read(png(pixels, wrong)) is None
    assert read(png(pixels, raw, end=b"")) is None
    assert read_plain_png(good, 62) is None  # more pixels than are permitted
    again = chunk(b"IDAT", zlib.compress(raw))
    assert read(png(pixels, raw, end=chunk(b"tIME", bytes(7)) + again + END)) is None
