"""Crops of 96 px of 13-band images of 16 bits (Sentinel-2's), by the kernel against channel by channel, one core.

The whole path: from TIFF and from `.npy` arrays of 120 x 120 px in shards to batches.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from _compare import compare
from _pipelines import loader_rows

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.transforms.config import Crop, Views

COUNT, ROWS = 128, 256
VIEWS = Views(global_crops=(Crop(size=96, scale=(0.2, 1.0)),))


def encoded(number: int, suffix: str) -> bytes:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 4000, (30, 30, 13)).repeat(4, axis=0).repeat(4, axis=1)
    image = (coarse + rng.integers(0, 200, coarse.shape)).astype(np.uint16)
    file = io.BytesIO()
    if suffix == "npy":
        np.save(file, image)
    else:
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig")
    return file.getvalue()


def write_shard(folder: Path, suffix: str) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for number in range(COUNT):
            content = encoded(number, suffix)
            member = tarfile.TarInfo(f"{number:06d}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("tif", "npy"):
            with open_dataset(write_shard(Path(folder) / suffix, suffix)) as dataset:
                ours, theirs = (
                    loader_rows(dataset, VIEWS, rows=ROWS, channels=13, bits=16, backend=backend)
                    for backend in ("native", "opencv")
                )
                compare(f"13 bands of 16 bits, {suffix}, one core", "images", ROWS, ours, theirs, turns=3, target=2)


if __name__ == "__main__":
    main()
