"""MAE's batches of 32-px images on this machine's cores: by processes of their own against the loader's threads.

First images a second, nothing being done with them. Then beside a training thread that runs small torch operations and
takes a batch after every so many: the share of its time in which it sleeps on the interpreter's lock. These are the
gaps between two operations in which the kernel counts a switch that the thread itself asked for; one that is taken its
core asks for none. Also how soon children are there.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _compare import compare
from PIL import Image

from data_pipelines.children.nursery import nursery
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.loader import Loader
from data_pipelines.packing.write import pack
from data_pipelines.rng import NamedDraw
from data_pipelines.rows import default_workers
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, Views

BATCH, STEPS, TURNS = 256, 10, 5
RATE = 3300  # images a second that the training thread takes
GAP = 30e-6  # s, longer than an operation takes
VIEWS = Views(global_crops=(Crop(size=32, scale=(0.2, 1.0)),))


def make_thumbnails(folder: Path, count: int) -> Path:
    """PNG images of 32 px, as CIFAR's."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((32, 32))
        noisy = np.asarray(coarse, np.int16) + rng.integers(-6, 7, (32, 32, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:05d}.png")
    pack(folder / "images", folder / "shards", progress=False)
    return folder / "shards"


def loader_of(dataset: Dataset, workers: int) -> Loader:
    section = {"name": "mae", "mask": {"unit": 4}, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    draw = NamedDraw(
        "pretrain.methods.registry:draw_fields_of",
        {"method": section, "size": [32, 32], "stride": 4, "batch_size": BATCH},
    )
    return Loader(Sampler((dataset,), seed=0, batch_size=BATCH), VIEWS, workers=workers, draw=draw)


def taking(loader: Loader) -> Callable[[], None]:
    """A call takes so many batches of one loader, which goes on making others."""
    steps = loader.steps()

    def call() -> None:
        for _ in range(STEPS):
            next(steps)

    return call


def asleep(loader: Loader, seconds: float) -> float:
    """The share of this thread's time in which it sleeps while it has work to do: on the interpreter's lock."""
    x, steps, slept, worked = torch.ones(64), loader.steps(), 0.0, 0.0
    next(steps)
    switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    while worked < seconds:
        began = last = time.perf_counter()
        while last - began < BATCH / RATE:
            x.mul_(1.0)
            now = time.perf_counter()
            if now - last > GAP:  # it slept, or others had the core, to which it did not agree
                before, switches = switches, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
                slept += now - last if switches > before else 0.0
            last = now
        worked += last - began
        next(steps)
        switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    steps.close()
    return slept / worked


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn beside a training thread")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    began = time.perf_counter()
    nursery().ended(0)  # which it answers once it is there
    print(f"the processes' nursery is there after {time.perf_counter() - began:.2f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder, open_dataset(make_thumbnails(Path(folder), 4096)) as dataset:
        workers = default_workers([dataset])
        began = time.perf_counter()
        with loader_of(dataset, workers) as loader:
            next(loader.steps())
        print(f"{workers} children, a first batch and their end: {time.perf_counter() - began:.2f} s", flush=True)
        with loader_of(dataset, workers) as children, loader_of(dataset, 0) as threads:
            ours, theirs = taking(children), taking(threads)
            what = f"MAE at 32 px, {workers} processes against {threads.threads} thread"
            compare(what, "images", STEPS * BATCH, ours, theirs, turns=TURNS, target=1.5)
        shares: dict[int, list[float]] = {workers: [], 0: []}
        for _ in range(TURNS):
            for number, found in shares.items():
                with loader_of(dataset, number) as loader:
                    found.append(asleep(loader, seconds))
        ours_, theirs_ = (statistics.median(found) for found in shares.values())
        print(
            f"a training thread sleeps on the lock {ours_:.1%} of its time, beside threads {theirs_:.1%} (target 3 %)"
        )


if __name__ == "__main__":
    main()
