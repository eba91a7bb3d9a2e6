"""Memory of a process that writes, decodes, maps and reads the features of a ViT-L: flat, however many images.

The encoder is a fake that gives rows of 5,120 values (the class tokens of 4 blocks and the mean), so that nothing but
the store is measured. Memory of the process's own (RssAnon) is what must stay flat; pages of mapped files (RssFile) are
the kernel's to take back. A million images take 10 GB in parts and as much decoded.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data_pipelines.remote.cache_folder import gigabytes
from eval.linear_heads import Kind, fit
from eval.probes.linear import LinearRecipe
from eval.store.decode import row_bytes
from eval.store.description import VERSION, Description, rows_per_part
from eval.store.embedding import embed_split
from eval.store.encoding import Batch
from eval.store.layout import Layout, Piece
from eval.store.reading import open_store

WIDTH = 1024
LAYOUT = Layout(
    tuple(Piece(name, i * WIDTH, (i + 1) * WIDTH) for i, name in enumerate(("b4", "b3", "b2", "class", "mean"))),
    {"class": (3 * WIDTH, 4 * WIDTH), "class of last 4 + mean": (0, 5 * WIDTH)}, "class", None, WIDTH,
)  # fmt: skip


class Fake:
    """Rows as of an encoder: one block of random ones again and again, told apart by their first value."""

    layout, with_tokens = LAYOUT, False
    crops = SimpleNamespace(channels=3)

    def batches(self, dataset: Any, samples: np.ndarray, batch_size: int) -> Iterator[Batch]:
        rows = np.random.default_rng(0).normal(size=(batch_size, LAYOUT.dim)).astype(np.float32)
        for start in range(0, len(samples), batch_size):
            numbers = samples[start : start + batch_size]
            found = rows[: len(numbers)].copy()
            found[:, 0] = numbers % 1000
            yield Batch(found, None, numbers % 10, numbers, numbers)


class Watch:
    """The most memory while a block runs, sampled twenty times a second."""

    def __enter__(self) -> Watch:
        self.own = self.file = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
            self.own, self.file = max(self.own, found["RssAnon"]), max(self.file, found["RssFile"])

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start


def measure(what: str, images: int, work: Callable[[], Any]) -> Any:
    """Run `work` and print the most memory meanwhile."""
    with Watch() as watch:
        found = work()
    print(
        f"{what}, {images:,} images: own {gigabytes(watch.own)}, mapped {gigabytes(watch.file)}, "
        f"{images / watch.seconds:,.0f} images/s",
        flush=True,
    )
    return found


def run(images: int, place: Path) -> None:
    """Write, decode, open and read a store of so many images."""
    identity: dict[str, Any] = {
        "version": VERSION, "split": "train", "num_samples": images, "layout": LAYOUT.as_json(),
        "features": "float16", "tokens": None, "crops": {"channels": 3},
    }  # fmt: skip
    identity["rows_per_part"] = rows_per_part(row_bytes(identity))
    folder, description = place / "train", Description(identity, {})
    encoder: Any = Fake()
    dataset: Any = SimpleNamespace(key=lambda number: (f"{number:09d}", None), index=SimpleNamespace(has_json=False))
    measure("written", images, lambda: embed_split(encoder, dataset, folder, description, progress=False))
    stored = measure("decoded", images, lambda: open_store(folder))["train"]
    features = measure("opened", images, stored.feature_set)
    recipe, kinds = LinearRecipe(epochs=1, batch_size=1024), {Kind("class", True): [0.1]}
    every = torch.arange(images)
    measure(
        "an epoch of linear", images,
        lambda: fit(features.inputs, features.labels, every, kinds, 10, recipe, 0, "cpu"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="On a disk with room for it.")
    asked = parser.parse_args()
    for images in asked.images:
        with tempfile.TemporaryDirectory(dir=asked.folder) as place:
            run(images, Path(place))


if __name__ == "__main__":
    main()
