"""What `selfsight pack` says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipelines.images.depth import depth_warning
from data_pipelines.images.issues import shown, visible
from data_pipelines.packing.map_folders import told
from data_pipelines.packing.meter import Meter
from data_pipelines.packing.pack_folder import SKIPPED
from data_pipelines.wording import counted, samples_in

MAX_SHOWN = 10  # names on the screen


def _report_labels(console: Console, result: dict[str, Any]) -> None:
    """The classes as they were understood, and what no probe will like of them."""
    counts = {split: entry["class_counts"] for split, entry in result["splits"].items() if entry["class_counts"]}
    if not counts:
        console.print("no labels")
        return
    names = result["classes"] or [str(number) for number in range(len(next(iter(counts.values()))))]
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    there = [f"{shown(name)} {count:,}" for name, count in zip(names, total, strict=True) if count]
    more = f" and {len(there) - MAX_SHOWN:,} more" if len(there) > MAX_SHOWN else ""
    console.print(f"{counted(len(there), 'class')}: {', '.join(there[:MAX_SHOWN])}{more}", markup=False)
    for split, found in counts.items():
        unknown = [shown(name) for name, own, known in zip(names, found, counts.get("train", found), strict=True)
                   if own and not known]  # fmt: skip
        if unknown:
            told = ", ".join(unknown[:MAX_SHOWN])
            console.print(
                f"{split} has {counted(len(unknown), 'class')} that train does not have: {told}",
                markup=False,
            )
    if result["groups"]:
        told = ", ".join(f"{count:,} in {split}" for split, count in result["groups"]["splits"].items())
        console.print(f"groups: {told}; none in two of them")


def _report_depth(console: Console, result: dict[str, Any]) -> None:
    measured = result["statistics"]
    for name in measured.get("bad_samples", ()):
        console.print(f"packed, and cannot be decoded: {name}; leave such out with --check full", markup=False)
    if measured.get("bits", 8) > 8:
        largest = round(max(measured["max"]) * ((1 << measured["bits"]) - 1))
        console.print(depth_warning(measured["bits"], largest, 8), markup=False)


def report(out: Path, result: dict[str, Any], meter: Meter) -> None:
    """What came out, and how fast."""
    console = Console(highlight=False, soft_wrap=True)
    for split, entry in result["splits"].items():
        console.print(f"{split}: {samples_in(entry['samples'], len(entry['shards']))}, {entry['bytes']:,} bytes")
    made = result["reencoding"]
    if made is not None:
        console.print(
            f"re-encoded {made['samples']:,} images ({made['share']:.1%}); all images together had "
            f"{made['bytes_before']:,} bytes and have {made['bytes_after']:,}"
        )
    console.print(f"read {meter.told()}")
    for note in result["notes"]:
        console.print(visible(note), markup=False)
    for line in told(result["maps"]):
        console.print(visible(line), markup=False)
    _report_labels(console, result)
    _report_depth(console, result)
    if result["num_left_out"]:
        console.print(f"left out {result['num_left_out']:,} images as asked")
    for entry in result["skipped"][:MAX_SHOWN]:
        console.print(f"skipped {shown(entry['path'])}: {shown(entry['reason'])}", markup=False)
    if result["num_skipped"] > MAX_SHOWN:
        name = SKIPPED if result["num_skipped"] > len(result["skipped"]) else "dataset.json"
        console.print(f"skipped {result['num_skipped']:,} in all; {out / name} lists them", markup=False)
