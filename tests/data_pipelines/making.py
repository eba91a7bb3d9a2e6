"""Pictures and tars for the tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image


def encode(pixels: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    """An image file of (h, w, 3) or (h, w) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def picture(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    """A smooth random image: (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def photo(seed: int, height: int = 375, width: int = 500) -> np.ndarray:
    """Noise at every scale as natural images have it, with edges and flat parts: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 110 + 60 * (rng.random(3) - 0.5))
    for octave in range(1, 9):
        cells = (2**octave * height // 250 + 2, 2**octave * width // 250 + 2)
        coarse = rng.normal(0, 12, (*cells, 3)) + rng.normal(0, 36, (*cells, 1))
        layer = Image.fromarray(np.clip(coarse + 128, 0, 255).astype(np.uint8))
        layer = layer.resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=float) - 128) * 0.75**octave
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 5, left : left + width // 4] = rng.integers(0, 256, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def bands(seed: int, channels: int = 13, height: int = 20, width: int = 24) -> np.ndarray:
    """A smooth random image of any number of channels, all levels of 16 bits in use: (h, w, channels) uint16."""
    coarse = np.random.default_rng(seed).uniform(0, 65536, (channels, 4, 5)).astype(np.float32)
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
    return np.stack(planes, axis=2).clip(0, 65535).astype(np.uint16)


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    """A TIFF file of an array; options of `tifffile.imwrite`."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An `.npy` file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of (h, w) or (h, w, 3 or 4) uint16."""
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]] if pixels.ndim == 3 else slice(None)
    done, content = cv2.imencode(".png", pixels[..., order])
    assert done
    return content.tobytes()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar with these members, in this order."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample_files(numbers: Iterable[int], suffix: str = "png") -> list[tuple[str, bytes]]:
    """Image and label members of samples 0, 1, ...; the label is the number modulo 10."""
    files: list[tuple[str, bytes]] = []
    for number in numbers:
        files.append((f"{number:06d}.{suffix}", encode(picture(number))))
        files.append((f"{number:06d}.cls", str(number % 10).encode()))
    return files
