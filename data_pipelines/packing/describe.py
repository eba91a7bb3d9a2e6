"""What `dataset.json` says of a packed data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.statistics import common_kind, draw_samples, headers_of, measure
from data_pipelines.packing.map_folders import MapCount
from data_pipelines.packing.pack_folder import read_receipt
from data_pipelines.packing.reencode import REENCODED
from data_pipelines.packing.scan import Catalogue

FORMAT_VERSION = 2
_MAX_MEASURED = 1000  # images whose pixels make the mean and the standard deviation
MAX_LISTED = 1000  # skipped images named


def describe(
    catalogue: Catalogue, plan: Mapping[str, Any], out: Path, shards: Sequence[str], workers: int
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Join the shards' receipts into one description; nothing in it depends on the day or the machine.

    Args:
        catalogue: What was packed.
        plan: With which settings.
        out: The folder of the shards and their receipts.
        shards: Their names, in order.
        workers: Threads that measure pixels.

    Returns:
        What `dataset.json` is to hold, and all that was skipped. Shards and splits of which no image can be used are
        not in it.

    Raises:
        ValueError: No image was packed.
    """
    skipped = [entry._asdict() for entry in catalogue.skipped]
    entries: dict[str, dict[str, Any]] = {name: {"samples": 0, "bytes": 0, "shards": []} for name in catalogue.splits}
    totals: dict[str, Counter[str]] = {name: Counter() for name in ("sizes", "modes", "outcomes")}
    labels: dict[str, Counter[str]] = {name: Counter() for name in catalogue.splits}
    before = after = 0
    maps = MapCount()
    for name in shards:  # one at a time: there may be tens of thousands
        receipt, split = read_receipt(out, name), name.rpartition("-")[0]
        assert receipt is not None, f"{name} was written just now"
        if receipt["samples"]:
            facts = {fact: receipt[fact] for fact in ("samples", "bytes", "sha256")}
            entries[split]["samples"] += receipt["samples"]
            entries[split]["bytes"] += receipt["bytes"]
            entries[split]["shards"].append({"name": name, **facts})
        labels[split].update(receipt["labels"])
        for counter, total in totals.items():
            total.update(receipt[counter])
        before, after = before + receipt["bytes_before"], after + receipt["bytes_after"]
        skipped += receipt["skipped"]
        maps.add_receipt(receipt.get("maps", {}), receipt["samples"])
    num_samples = sum(entry["samples"] for entry in entries.values())
    if not num_samples:
        first = skipped[0]
        raise ValueError(
            f"none of the {len(skipped)} images can be read; the first, {first['path']}: {first['reason']}"
        )
    unusable = [split for split, entry in entries.items() if not entry["samples"]]
    for split in unusable:
        del entries[split]
    classes = catalogue.classes
    num_classes = (
        len(classes) if classes else 1 + max((int(label) for found in labels.values() for label in found), default=-1)
    )
    for split, entry in entries.items():
        counts = [labels[split][str(label)] for label in range(num_classes)]
        entry["class_counts"] = counts if num_classes else None
    measured = "train" if "train" in entries else next(iter(entries))
    with open_dataset(out, measured) as dataset:
        statistics = pixel_statistics(dataset, plan["seed"], workers)
    return {
        "version": FORMAT_VERSION,
        "splits": entries,
        "classes": None if classes is None else list(classes),
        **statistics,
        "images": _summarise(totals["sizes"]) | {"modes": dict(sorted(totals["modes"].items()))},
        "reencoding": None if plan["reencoding"] is None else _describe_reencoding(totals["outcomes"], before, after),
        "num_left_out": catalogue.num_left_out,
        "num_skipped": len(skipped),
        "skipped": skipped[:MAX_LISTED],
        "notes": [
            *catalogue.source.notes,
            *(f"no image of {split} can be read: there is no {split}" for split in unusable),
        ],
        "groups": None
        if catalogue.groups is None
        else {"key": catalogue.source.listing.group_key, "splits": catalogue.groups},  # in the json of each image
        "maps": maps.as_json(),
        "mask_names": plan["mask_names"],
        "metadata": plan["metadata"],
        "pack": dict(plan),
    }, skipped


def _describe_reencoding(outcomes: Counter[str], before: int, after: int) -> dict[str, Any]:
    """How many images became smaller files, why others did not, and what it saved."""
    samples = outcomes[REENCODED]
    return {
        "samples": samples,
        "share": round(samples / outcomes.total(), 6),
        "kept": {reason: count for reason, count in sorted(outcomes.items()) if reason != REENCODED},
        "bytes_before": before,
        "bytes_after": after,
    }


def _summarise(sizes: Counter[str]) -> dict[str, Any]:
    """Widths and heights in px: smallest, median, largest."""
    pairs = np.array([[int(side) for side in size.split("x")] for size in sizes])
    counts = np.array(list(sizes.values()))
    summary: dict[str, Any] = {}
    for name, sides in (("width", pairs[:, 0]), ("height", pairs[:, 1])):
        order = np.argsort(sides)
        middle = np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)
        summary[name] = [int(sides.min()), int(sides[order][middle]), int(sides.max())]
    return summary


def pixel_statistics(dataset: Dataset, seed: int, workers: int) -> dict[str, Any]:
    """Mean and standard deviation of the pixels, per channel and in 0 .. 1, and what else `measure` tells.

    Measured on up to 1,000 images drawn by `seed`. Where they have no number of channels in common there is no mean and
    no deviation of all, so both are null, and `statistics` says why.
    """
    numbers = draw_samples(seed, dataset.num_samples, _MAX_MEASURED)
    kind, why = common_kind(headers_of(dataset.read, numbers))
    if kind is None:
        return {"mean": None, "std": None, "statistics": {"none": why}}
    measured = measure(dataset.read, numbers, kind, workers)
    return {"mean": list(measured.mean), "std": list(measured.std), "statistics": measured.for_json()}
