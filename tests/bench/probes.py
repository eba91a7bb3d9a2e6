"""How long each measure takes once features are stored: 25,000 images of width 384 to learn from and 5,000 to test on.

    python tests/bench/probes.py [--train 25000] [--val 5000] [--width 384] [--only NAME ...]

Of probes that read pooled features, on each kind of label that they take; the linear probe with its three seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from eval import registry
from eval.base import FeatureSet, LabelKind, Store

CLASSES = 10
LIMIT = 10.0  # seconds


def labels_of(kind: LabelKind, signal: torch.Tensor) -> torch.Tensor:
    """What is to be predicted from noisy scores (n, classes)."""
    if kind == "class":
        return signal.argmax(dim=1)
    if kind == "several":
        return (signal > 1).float()
    return signal[:, 0] if kind == "number" else (signal[:, 0] * 1.2 + 1.5).round().clamp(0, 3).long()


def store_of(kind: LabelKind, num_train: int, num_val: int, width: int) -> Store:
    """Features as of a ViT with a class token: class, mean and both, of which a direction a class says something."""
    generator = torch.Generator().manual_seed(1000)  # not a seed of heads: their first weights would be the directions
    directions = torch.randn(CLASSES, width, generator=generator) / width**0.5

    def split(num: int) -> FeatureSet:
        matrix = torch.randn(num, 2 * width, generator=generator)
        signal = matrix[:, :width] @ directions.T * 2 + torch.randn(num, CLASSES, generator=generator)
        inputs = {"class": matrix[:, :width], "mean": matrix[:, width:], "class + mean": matrix}
        return FeatureSet(inputs, "class", labels_of(kind, signal), torch.arange(num), torch.arange(num))

    train, val = split(num_train), split(num_val)
    num_classes = {"class": CLASSES, "several": CLASSES, "number": 0, "grade": 4}[kind]
    names = tuple(map(str, range(num_classes)))
    return Store(train, val, num_classes, "class", (0, 1, 2), kind=kind, class_names=names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("train", 25_000), ("val", 5_000), ("width", 384), ("turns", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    specs = [spec for spec in map(registry.load, registry.built_in()) if spec.needs == "pooled"]
    kinds: tuple[LabelKind, ...] = ("class", "several", "number", "grade")
    for kind in kinds:
        store = store_of(kind, given.train, given.val, given.width)
        for spec in specs:
            if not spec.takes(kind) or (given.only and spec.name not in given.only):
                continue
            seconds = []
            for _ in range(given.turns):
                start = time.perf_counter()
                spec.run(store, spec.settings())
                seconds.append(time.perf_counter() - start)
            taken = statistics.median(seconds)
            print(f"{kind}: {spec.name} {taken:.1f} s{'' if taken < LIMIT else f' (over {LIMIT:g})'}", flush=True)


if __name__ == "__main__":
    main()
