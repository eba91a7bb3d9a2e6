"""Half an hour of the whole loader at full speed: does its memory stay flat?

Photographs are read, decoded, cropped and put into batches as fast as they go, over many passes of the data. Resident
memory, open files and threads are sampled all along. After a warm-up of a fifth of the time a line is fitted to the
memory; its standard error is taken from the medians of 20 stretches, as neighbouring samples depend on each other.

Exit code 1: the memory grows by more than 20 MB/h and by more than three standard errors, or there are more open files
or threads at the end than after the warm-up.

    python tests/bench/streaming.py [--minutes 30] [--shards FOLDER] [--preset dino_vits16_in1k_100] [--out memory.csv]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from data_pipelines.loader import Loader
from data_pipelines.packing.write import pack
from pretrain.config.load import load_config
from pretrain.methods.registry import draw_fields_for
from pretrain.stream.datasets import open_datasets, sampler_of

WARM_UP = 0.2  # of the time
MOST_GROWTH = 20.0  # MB/h
STRETCHES = 20
IMAGES = 1024  # generated


class State(NamedTuple):
    """Of this process at one moment."""

    seconds: float
    rss: float  # MB
    files: int
    threads: int
    images: int


def state(seconds: float, images: int) -> State:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kernel = dict(line.split(":", 1) for line in lines if ":" in line)
    files = len(list(Path("/proc/self/fd").iterdir()))
    return State(seconds, int(kernel["VmRSS"].split()[0]) / 1024, files, int(kernel["Threads"]), images)


def make_photos(folder: Path, count: int) -> Path:
    """JPEGs of 500x375 px: pieces of scikit-learn's two photographs, from a third of their width to all of it."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    folder.mkdir()
    for number in range(count):
        photo = photos[number % len(photos)]
        width = int(rng.integers(photo.width // 3, photo.width * 4 // 5))
        height = width * 3 // 4
        left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
        piece = photo.resize((500, 375), box=(left, top, left + width, top + height))
        piece.save(folder / f"{number:05d}.jpg", quality=90)
    return folder


@contextmanager
def shards_of(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        pack(
            make_photos(Path(folder) / "photos", IMAGES), Path(folder) / "shards", samples_per_shard=128, progress=False
        )
        yield str(Path(folder) / "shards")


def stream(shards: str, preset: str, batch_size: int, minutes: float, interval: float) -> list[State]:
    """The states of the process from the first batch to the end."""
    config = load_config(preset, [f"data.train={shards}", f"train.batch_size={batch_size}"])
    sampler = sampler_of(config, open_datasets(config.data))
    states: list[State] = []
    data = config.data
    with Loader(sampler, config.views, draw=draw_fields_for(config), channels=data.channels, bits=data.bits) as loader:
        steps = loader.steps()
        next(steps)
        began, images, told = time.monotonic(), 0, 0.0
        print(f"{sampler.summary()}; {preset}, crops by {loader.backend}")
        while (elapsed := time.monotonic() - began) < 60 * minutes:
            if not states or elapsed - states[-1].seconds >= interval:
                states.append(state(elapsed, images))
                if elapsed - told >= 60:
                    told = elapsed
                    print(
                        f"{elapsed / 60:5.1f} min: {states[-1].rss:,.1f} MB, {images / elapsed:,.0f} images/s",
                        flush=True,
                    )
            next(steps)
            images += batch_size
        states.append(state(elapsed, images))
        steps.close()
    return states


def growth(states: list[State]) -> tuple[float, float]:
    """MB/h and its standard error, from the medians of equal stretches of time."""
    seconds, rss = (np.array([getattr(at, name) for at in states]) for name in ("seconds", "rss"))
    edges = np.linspace(seconds[0], seconds[-1], min(STRETCHES, len(states) // 2) + 1)
    parts = [(seconds >= low) & (seconds <= high) for low, high in pairwise(edges)]
    points = np.array([(np.median(seconds[part]), np.median(rss[part])) for part in parts if part.any()])
    hours, memory = points[:, 0] / 3600, points[:, 1]
    slope, start = np.polyfit(hours, memory, 1)
    residuals = memory - start - slope * hours
    spread = ((hours - hours.mean()) ** 2).sum()
    return float(slope), float(np.sqrt((residuals**2).sum() / max(len(hours) - 2, 1) / spread))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--shards", help="a folder of shards; default: photographs made for this")
    parser.add_argument("--preset", default="dino_vits16_in1k_100")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--interval", type=float, default=2, help="seconds between looks at the memory")
    parser.add_argument("--out", type=Path, help="a .csv that gets every look")
    arguments = parser.parse_args()
    with shards_of(arguments.shards) as shards:
        states = stream(shards, arguments.preset, arguments.batch, arguments.minutes, arguments.interval)
    if arguments.out is not None:
        rows = [",".join(map(str, at)) for at in states]
        arguments.out.write_text("\n".join([",".join(State._fields), *rows]) + "\n", encoding="utf-8")
    settled = [at for at in states if at.seconds >= WARM_UP * 60 * arguments.minutes]
    if len(settled) < 6:
        parser.error(f"{len(settled)} looks at the memory are too few; take more --minutes or a shorter --interval")
    first, last = settled[0], settled[-1]
    slope, error = growth(settled)
    print(f"images/s: {last.images / last.seconds:,.0f} ({last.images:,} images)")
    print(f"resident memory: {states[0].rss:,.1f} MB at first, {first.rss:,.1f} warm, {last.rss:,.1f} at the end")
    print(f"slope after the warm-up: {slope:+,.1f} MB/h, standard error {error:,.1f}")
    print(f"open files: {first.files} warm, {last.files} at the end; threads: {first.threads}, {last.threads}")
    grows = slope > MOST_GROWTH and slope > 3 * error
    leaks = last.files > first.files or last.threads > first.threads
    print("not flat" if grows or leaks else "flat")
    return int(grows or leaks)


if __name__ == "__main__":
    sys.exit(main())
