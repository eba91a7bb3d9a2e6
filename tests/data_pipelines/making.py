"""Pictures and tars for the tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
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
