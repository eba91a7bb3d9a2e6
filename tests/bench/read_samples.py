"""Samples read from local tars: index and pread against WebDataset's own iterator over the same files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import webdataset as wds
from _compare import compare

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.demo import build_demo
from data_pipelines.packing.write import pack


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        pack(build_demo(Path(folder) / "images", train=2000, val=10), shards, progress=False)
        dataset = open_dataset(shards)
        paths = [str(path) for path in sorted(shards.glob("train-*.tar"))]

        def ours() -> None:
            for sample in range(dataset.num_samples):
                dataset.read(sample)

        def theirs() -> None:
            for _ in wds.WebDataset(paths, shardshuffle=False):
                pass

        compare("samples read", "samples", dataset.num_samples, ours, theirs)


if __name__ == "__main__":
    main()
