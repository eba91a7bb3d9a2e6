"""Pictures that cost what photos cost: 500 x 375 px, about 110 KB as JPEG, most of it entropy-coded detail."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image


def photo(seed: int, height: int = 375, width: int = 500) -> Image.Image:
    """Smooth colours, edges, and noise at every scale as natural images have it."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for octave in range(1, 9):
        cells = (2**octave * height // 250 + 2, 2**octave * width // 250 + 2)
        coarse = rng.normal(0, 1, (*cells, 3)) * 0.3 + rng.normal(0, 1, (*cells, 1))
        layer = Image.fromarray(np.clip(coarse * 40 + 128, 0, 255).astype(np.uint8))
        pixels += (
            np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), dtype=float) - 128
        ) * 0.75**octave
    pixels += 60 * (rng.random(3) - 0.5)
    return Image.fromarray(np.clip(pixels * 0.8 + 128, 0, 255).astype(np.uint8))


def jpegs(count: int, height: int = 375, width: int = 500, quality: int = 97) -> list[bytes]:
    """Encoded photos; of four, three have their full resolution of colour, as in ImageNet."""
    encoded = []
    for seed in range(count):
        file = io.BytesIO()
        subsampling = "4:2:0" if seed % 4 == 0 else "4:4:4"
        photo(seed, height, width).save(file, "JPEG", quality=quality, subsampling=subsampling)
        encoded.append(file.getvalue())
    return encoded


def write_shards(folder: Path, count: int = 128, shards: int = 4) -> Path:
    """Such photos in shards of equal size, as WebDataset writes them."""
    contents = jpegs(count)
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for number in range(shard, count, shards):
                writer.write({"__key__": f"{number:06d}", "jpg": contents[number], "cls": str(number % 10)})
    return folder
