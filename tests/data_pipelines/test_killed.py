"""A process that streams is killed in mid-step; another goes on, and together they saw what one would have seen."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.loader import Loader
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, LocalCrops, Views

ROOT = Path(__file__).parents[2]
VIEWS = Views(
    global_crops=(Crop(size=16, jitter=(0.4, 0.4, 0.2, 0.1), blur=0.5),) * 2, local_crops=LocalCrops(size=8, count=2)
)
NUM_STEPS = 12


def digests(shards: Path, start: int, threads: int) -> Iterator[str]:
    """A hash of all that each step from `start` on shows: which samples, their crops and their masks."""

    def draw(*place: int) -> dict[str, np.ndarray]:
        return {"drop_mask": np.random.default_rng(place).random((4, 4)) < 0.5}

    sampler = Sampler([open_dataset(shards)], seed=3, batch_size=10)
    with Loader(sampler, VIEWS, threads=threads, draw=draw) as loader:
        for micro_batches in loader.steps(start):
            digest = hashlib.sha256()
            for name, part in sorted(micro_batches[0].items()):
                if isinstance(part, torch.Tensor):
                    digest.update(name.encode() + part.numpy().tobytes())
            yield digest.hexdigest()


def read_until_killed(shards: Path, start: int, threads: int, count: int) -> list[str]:
    """The first `count` digests of a process of its own, which is then killed where it stands."""
    command = [sys.executable, "-c", f"from {Path(__file__).stem} import stream; stream()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    command += [str(shards), str(start), str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [line.strip() for line in islice(process.stdout, count)]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return lines


def stream() -> None:
    """What the killed process does, without end."""
    shards, start, threads = sys.argv[1:]
    for digest in digests(Path(shards), int(start), int(threads)):
        print(digest, flush=True)


@pytest.mark.parametrize("fresh_index", [False, True])
def test_a_killed_stream_goes_on_where_it_was(shards: Path, tmp_path: Path, fresh_index: bool) -> None:
    """Also where the killed process was the first to open the shards, and built their indexes."""
    whole = list(islice(digests(shards, 0, threads=1), NUM_STEPS))
    assert len(set(whole)) == NUM_STEPS
    if fresh_index:
        for shard in shards.glob("*.tar"):
            (tmp_path / shard.name).write_bytes(shard.read_bytes())
        shards = tmp_path
    seen = read_until_killed(shards, 0, threads=3, count=5)
    seen += read_until_killed(shards, 5, threads=2, count=1)
    seen += islice(digests(shards, 6, threads=1), NUM_STEPS - 6)
    assert seen == whole
