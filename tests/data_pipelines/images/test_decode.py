"""Bytes of every kind to 8-bit RGB or grey, or an error that names the sample."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from making import encode, picture
from PIL import Image

from data_pipelines.images import decode as decode_module
from data_pipelines.images.decode import BadSampleError, decode
from data_pipelines.images.sample import Sample

PIXELS = picture(1)


def sample(content: bytes) -> Sample:
    return Sample("the-key", Path("train-000003.tar"), content, None)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back(format: str, options: dict[str, object]) -> None:
    np.testing.assert_array_equal(decode(sample(encode(PIXELS, format, **options))), PIXELS)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb_or_grey(mode: str) -> None:
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = Image.fromarray(PIXELS).convert("L").convert("RGB").convert(mode)
    grey = np.asarray(Image.fromarray(PIXELS).convert("L"), dtype=float)
    for channels in (3, 1):
        found = decode(sample(saved(image, format)), channels)
        assert found.shape == (*PIXELS.shape[:2], channels)
        assert found.dtype == np.uint8
        if mode not in ("1", "P"):
            assert np.abs(found.mean(axis=2) - grey).mean() < 4


def test_transparent_is_black() -> None:
    pixels = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, dtype=np.uint8)])
    pixels[:5, :, 3] = 0
    found = decode(sample(encode(pixels)))
    assert not found[:5].any()
    np.testing.assert_array_equal(found[5:], PIXELS[5:])


def test_of_16_bits_the_high_byte_is_kept() -> None:
    levels = np.linspace(0, 65535, 20 * 24).reshape(20, 24).astype(np.uint16)
    found = decode(sample(encode(levels)), channels=1)[:, :, 0]
    assert np.abs(found.astype(int) - (levels >> 8)).max() <= 1
    assert decode(sample(encode(levels))).shape == (20, 24, 3)


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    found = decode(sample(encode(PIXELS, "PNG", exif=exif)))
    np.testing.assert_array_equal(found, np.rot90(PIXELS, -1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.8])
def test_a_truncated_image_is_named(format: str, share: float) -> None:
    content = encode(picture(2, 90, 90), format)
    with pytest.raises(BadSampleError, match=r"the-key of train-000003\.tar") as error:
        decode(sample(content[: int(share * len(content))]))
    assert error.value.key == "the-key"


def test_other_formats_and_garbage_are_refused() -> None:
    for content in (encode(PIXELS, "BMP"), encode(PIXELS, "GIF"), b"GET / HTTP/1.1", bytes(1000)):
        with pytest.raises(BadSampleError, match="not a JPEG, PNG, WebP, TIFF or npy image"):
            decode(sample(content))


def test_flipped_bits_never_raise_anything_else() -> None:
    draw = np.random.default_rng(0)
    refused = decoded = 0
    for format in ("PNG", "JPEG", "WEBP"):
        content = np.frombuffer(encode(PIXELS, format), dtype=np.uint8)
        for _ in range(200):
            damaged = content.copy()
            damaged[draw.integers(len(content), size=3)] ^= draw.integers(1, 256, 3, dtype=np.uint8)
            try:
                image = decode(sample(damaged.tobytes()))
            except BadSampleError:
                refused += 1
            else:
                assert image.shape[2] == 3
                decoded += 1
    assert refused > 100
    assert decoded > 100


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 100)
    with pytest.raises(BadSampleError, match="24x20 pixels are more than 100"):
        decode(sample(encode(PIXELS)))
