"""`selfsight data stats`: what the pixels of shards are, measured and written into their `dataset.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.cores import cores_per_process
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.datasets.statistics import (
    PERCENTILES,
    Kind,
    common_kind,
    draw_samples,
    headers_of,
    measure,
    summarise_headers,
)
from data_pipelines.files import read_json, write_json
from data_pipelines.remote.remote_files import Shard
from data_pipelines.remote.urls import redact
from data_pipelines.wording import counted

_MAX_HEADERS = 1000  # looked at to tell what the images are


def data_stats(
    shards: str | Path,
    *,
    split: str = "train",
    samples: int = 10_000,
    channels: int | None = None,
    bits: int | None = None,
    frames: int = 1,
    seed: int = 0,
    write: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the pixels of up to `samples` images of a data set, drawn by `seed`.

    Args:
        shards: As of `open_dataset`.
        split: Of a folder.
        samples: At most.
        channels: What the images are measured as, as `data.channels`; default: what the files have.
        bits: Likewise, 8 or 16.
        frames: As `data.frames`; with several, samples are stacks.
        seed: Of which images are drawn.
        write: Put mean, std and the rest into the `dataset.json` beside the shards. What else is in there stays.
        workers: Threads; default: the cores this process may use.
        progress: Show a bar and a table.

    Returns:
        What is written: `mean` and `std` per channel, of pixels in 0 .. 1 of their full range, and `statistics`.

    Raises:
        ValueError: The files have no number of channels in common and none is given, or none can be decoded so.
        FileNotFoundError: There are no such shards.
    """
    workers = workers or cores_per_process()
    if samples < 1:
        raise ValueError(f"samples is {samples}; measure 1 or more")
    with open_dataset(shards, split) as dataset:
        place = _place(dataset.shards) if write else None
        numbers = draw_samples(seed, dataset.num_samples, samples)
        headers = headers_of(dataset.read, numbers[:: max(1, len(numbers) // _MAX_HEADERS)])
        found, why = common_kind(headers)
        if channels is None and found is None:
            raise ValueError(f"{redact(str(shards))}: {why}; say with --channels as what they are to be measured")
        kind = Kind(
            channels or (found.channels if found else 1), bits or max((header.bits for header in headers), default=8)
        )
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("measuring", total=len(numbers))
            measured = measure(dataset.read, numbers, kind, workers, lambda count: bar.advance(task, count), frames)
        entry = {
            "mean": list(measured.mean),
            "std": list(measured.std),
            "statistics": {
                **measured.for_json(),
                **({"frames": frames} if frames > 1 else {}),
                "split": split if Path(shards).expanduser().is_dir() else None,
                "of": dataset.num_samples,
                "seed": seed,
                **summarise_headers(headers),
            },
        }
    console = Console(highlight=False, soft_wrap=True, quiet=not progress)
    _print(console, entry)
    if place is not None:
        _write(console, place, entry)
    return entry


def _place(shards: tuple[Shard, ...]) -> Path:
    """The `dataset.json` that is read with these shards."""
    folders = {shard.parent for shard in shards if isinstance(shard, Path)}
    if any(not isinstance(shard, Path) for shard in shards):
        raise ValueError("shards elsewhere are not written to; measure them without --write, and publish what is found")
    if len(folders) > 1:
        raise ValueError(
            f"the shards lie in {len(folders)} folders, and a dataset.json is beside its shards; measure one folder "
            "at a time, or all without --write and set data.mean and data.std"
        )
    place = folders.pop() / "dataset.json"
    info = read_json(place)
    if info is not None and not isinstance(info, dict):
        raise ValueError(f"{place} holds {type(info).__name__} and no mapping; move it away and measure again")
    return place


def _write(console: Console, place: Path, entry: dict[str, Any]) -> None:
    """Put `entry` into the file, and say what it replaces."""
    info = read_json(place)
    write_json(place, {**(info or {}), **entry})
    console.print(f"{'wrote' if info is None else 'changed'} {place}:", markup=False)
    for name in ("mean", "std"):
        before = (info or {}).get(name)
        if before != entry[name]:
            console.print(f"  {name}: {before} -> {entry[name]}", markup=False)
    if info is not None and all(info.get(name) == entry[name] for name in ("mean", "std")):
        console.print("  mean and std are as they were", markup=False)


def _print(console: Console, entry: dict[str, Any]) -> None:
    measured = entry["statistics"]
    sides = []
    for side in ("width", "height"):
        least, median, most = measured[side]
        sides.append(f"{side} {least} to {most} px, median {median}")
    told = f", {measured['bad']:,} more cannot be decoded so" if measured["bad"] else ""
    console.print(
        f"{measured['samples']:,} of {measured['of']:,} samples as {counted(measured['channels'], 'channel')} of "
        f"{measured['bits']} bits{told}; {'; '.join(sides)}"
    )
    for what in ("formats", "modes"):
        counts = ", ".join(f"{name} {count:,}" for name, count in measured[what].items())
        console.print(f"{what}: {counts}", markup=False)
    console.print("in 0 .. 1 of the full range:", markup=False)
    names = ("mean", "std", "min", *(f"{percent} %" for percent in PERCENTILES), "max")
    console.print("channel  " + "".join(f"{name:>10}" for name in names))
    for channel in range(measured["channels"]):
        values = [entry["mean"], entry["std"], measured["min"], *measured["percentiles"].values(), measured["max"]]
        console.print(f"{channel:>7}  " + "".join(f"{column[channel]:>10.6f}" for column in values))
    constant = [channel for channel, value in enumerate(entry["std"]) if value == 0]
    if constant:
        console.print(
            f"one value everywhere in channel {', '.join(map(str, constant))}: a run cannot divide by their "
            "deviation of 0. Leave them out of the images, or set data.std",
            markup=False,
        )
