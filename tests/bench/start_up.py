"""Opening a large data set: seconds and memory of a fresh process, over a made-up index and empty shards."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipelines.datasets.dataset_index import joint_place
from data_pipelines.shards.index import Findings, Index, one_shard
from data_pipelines.shards.index_format import store, write_joined
from data_pipelines.shards.shard import Identity

IMAGE_BYTES, STAMP = 110_000, 1_700_000_000_000_000_000

OPEN = """
import os, sys, time
import numpy as np
import data_pipelines.datasets.dataset, data_pipelines.sampler

def megabytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

before, began = megabytes(), time.perf_counter()
dataset = data_pipelines.datasets.dataset.open_dataset(sys.argv[1])
sampler = data_pipelines.sampler.Sampler((dataset,), seed=0, batch_size=4096)
sampler.state()
opened, memory = time.perf_counter() - began, megabytes()
print(f"{dataset.num_samples:,} samples in {len(dataset.shards):,} shards")
print(f"opened in {opened:.2f} s; {memory - before:.0f} MB beyond the {before:.0f} MB of the imports")
steps = [int(step) for step in np.random.default_rng(0).integers(0, 10 * sampler.steps_per_epoch, 20)]
began = time.perf_counter()
rows = [sampler.rows(step, range(sampler.batch_size)) for step in steps]
print(f"rows of a random step (4,096): {(time.perf_counter() - began) / len(steps) * 1000:.0f} ms")
began = time.perf_counter()
for row in rows[0]:
    dataset.key(row.sample)
print(f"a sample located: {(time.perf_counter() - began) / len(rows[0]) * 1e6:.1f} microseconds")
print(f"{megabytes() - before:.0f} MB after that")
"""


def make(folder: Path, num_shards: int, samples_per_shard: int) -> None:
    """Shards of holes, and an index of what they would hold."""
    blocks = 3 + np.arange(samples_per_shard) * (IMAGE_BYTES // 512 + 4)
    size = int(blocks[-1] + IMAGE_BYTES // 512 + 4) * 512
    keys = [f"n{number:015d}".encode() for number in range(samples_per_shard)]
    arrays = {
        "image_blocks": blocks,
        "image_sizes": np.full(samples_per_shard, IMAGE_BYTES),
        "labels": np.arange(samples_per_shard) % 1000,
        "key_ends": np.cumsum([len(key) for key in keys]),
        "json_blocks": np.zeros(samples_per_shard, np.int64),
        "json_sizes": np.zeros(samples_per_shard, np.int64),
    }
    template = one_shard("", Identity(size, STAMP), b"".join(keys), arrays, Findings())
    names = [f"train-{shard:06d}.tar" for shard in range(num_shards)]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(size)
        os.utime(folder / name, ns=(STAMP, STAMP))

    def part(name: str) -> Index:
        return replace(template, names=(name,))

    if not store(
        joint_place(folder, "train"), lambda file: write_joined(file, [lambda n=name: part(n) for name in names])
    ):
        raise OSError(f"no space for the index in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10_000, help="in each")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        make(Path(folder), options.shards, options.samples)
        megabytes = joint_place(Path(folder), "train").stat().st_size / 1e6
        print(f"made an index of {megabytes:,.0f} MB in {time.perf_counter() - began:.0f} s")
        for _ in range(options.turns):
            subprocess.run([sys.executable, "-c", OPEN, folder], check=True)


if __name__ == "__main__":
    main()
