"""What `dataset.json` says of a packed data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.index import Sample
from data_pipelines.scan import Item, Tree
from data_pipelines.statistics import common_kind, draw_samples, headers_of, measure

FORMAT_VERSION = 1
_MAX_MEASURED = 1000  # images whose pixels make the mean and the standard deviation
_MAX_LISTED = 1000  # skipped images named


def describe(
    tree: Tree,
    plan: Mapping[str, Any],
    receipts: Mapping[str, Mapping[str, Any]],
    workers: int,
) -> dict[str, Any]:
    """Join the shards' receipts into one description; nothing in it depends on the day or the machine."""
    skipped = [entry for receipt in receipts.values() for entry in receipt["skipped"]]
    splits = {split: _describe_split(split, tree.classes, receipts) for split in tree.splits}
    num_samples = sum(entry["samples"] for entry in splits.values())
    if not num_samples:
        raise ValueError(
            f"none of the {len(skipped)} images can be read; the first, {skipped[0]['path']}: {skipped[0]['reason']}"
        )
    measured = "train" if "train" in splits else next(iter(splits))
    skipped_paths = {entry["path"] for entry in skipped}
    readable = [item for item in tree.splits[measured] if item.path not in skipped_paths]
    statistics = pixel_statistics(tree.root, readable, plan["seed"], workers)
    return {
        "version": FORMAT_VERSION,
        "splits": splits,
        "classes": None if tree.classes is None else list(tree.classes),
        **statistics,
        "images": _summarise(receipts),
        "num_skipped": len(skipped),
        "skipped": skipped[:_MAX_LISTED],
        "metadata": plan["metadata"],
        "pack": dict(plan),
    }


def _describe_split(
    split: str, classes: tuple[str, ...] | None, receipts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    own = {name: receipt for name, receipt in receipts.items() if name.rpartition("-")[0] == split}
    counts = _sum(receipt["labels"] for receipt in own.values())
    return {
        "samples": sum(receipt["samples"] for receipt in own.values()),
        "bytes": sum(receipt["bytes"] for receipt in own.values()),
        "class_counts": None if classes is None else [counts[str(label)] for label in range(len(classes))],
        "shards": [
            {"name": name, **{field: receipt[field] for field in ("samples", "bytes", "sha256")}}
            for name, receipt in own.items()
        ],
    }


def _summarise(receipts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Widths and heights in px (smallest, median, largest) and Pillow's modes."""
    sizes = _sum(receipt["sizes"] for receipt in receipts.values())
    pairs = np.array([[int(side) for side in size.split("x")] for size in sizes])
    counts = np.array(list(sizes.values()))
    summary: dict[str, Any] = {}
    for name, sides in (("width", pairs[:, 0]), ("height", pairs[:, 1])):
        order = np.argsort(sides)
        middle = np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)
        summary[name] = [int(sides.min()), int(sides[order][middle]), int(sides.max())]
    return summary | {"modes": dict(sorted(_sum(receipt["modes"] for receipt in receipts.values()).items()))}


def _sum(counts: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return total


def pixel_statistics(root: Path, items: list[Item], seed: int, workers: int) -> dict[str, Any]:
    """Mean and standard deviation of the pixels, per channel and in 0 .. 1, and what else `measure` tells.

    Measured on up to 1,000 images drawn by `seed`. Where they have no number of channels in common there is no mean and
    no deviation of all, so both are null, and `statistics` says why.
    """

    def read(number: int) -> Sample:
        path = root / items[number].path
        return Sample(path.name, path.parent, path.read_bytes(), None)

    numbers = draw_samples(seed, len(items), _MAX_MEASURED)
    kind, why = common_kind(headers_of(read, numbers))
    if kind is None:
        return {"mean": None, "std": None, "statistics": {"none": why}}
    measured = measure(read, numbers, kind, workers)
    return {"mean": list(measured.mean), "std": list(measured.std), "statistics": measured.for_json()}
