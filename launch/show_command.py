"""What `selfsight data show` writes: samples.png, statistics.png and, of a preset, crops.png."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from data_pipelines.checks.show import measure, samples_sheet, statistics_figure, summary
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.files import atomic_write, check_writable


def show(
    shards: str,
    out: Path,
    *,
    split: str,
    preset: str | None,
    overrides: Sequence[str],
    count: int,
    rows: int,
    seed: int,
    step: int,
    bands: str | None,
    threads: int | None,
    progress: bool,
) -> None:
    """Write the sheets into `out` and print a summary.

    Raises ValueError for a preset or band that there is not, before anything is written.
    """
    if overrides and preset is None:
        raise ValueError(f"{overrides[0]!r} changes a preset; name it with --preset")
    chosen = (0, 1, 2) if bands is None else _bands(bands)
    check_writable(out)
    notes: list[str] = []
    frames = 1
    sheets: dict[str, Callable[[BinaryIO], None]] = {}
    with open_dataset(shards, split) as dataset:
        if preset is not None:
            from data_pipelines.packing.grouping import NO_GROUPS
            from launch.crop_sheet import crop_sheet
            from launch.own_data import prepare
            from pretrain.config.load import load_config

            preset, settings, _ = prepare(preset, overrides, shards, NO_GROUPS)
            config = load_config(preset, settings)
            asked = config.train.batch_size
            if asked > dataset.num_samples * config.data.repeated_augmentation:
                # a few images are enough to look at, and a run says itself that its batch is too large
                few = (
                    max(1, min(rows, dataset.num_samples) // config.data.repeated_augmentation)
                    * config.data.repeated_augmentation
                )
                config = load_config(preset, [*settings, f"train.batch_size={few}", "train.grad_accum_steps=1"])
                notes.append(
                    f"train.batch_size is {asked:,}, which a run on {dataset.num_samples:,} samples refuses; the crops "
                    f"shown are those of a batch of {few}"
                )
            if bands is None and config.data.channels > 3:
                chosen = config.tracking.picture_channels
            frames = config.data.frames
            crops = crop_sheet(config, [dataset], rows, step, chosen)
            sheets["crops.png"] = lambda file: crops.save(file, "PNG")
        samples = samples_sheet(dataset, count, seed, chosen, frames)
        sheets["samples.png"] = lambda file: samples.save(file, "PNG")
        statistics = measure(dataset, seed, threads, progress)
    figure = statistics_figure(statistics)
    sheets["statistics.png"] = lambda file: figure.savefig(file, format="png")
    out.mkdir(parents=True, exist_ok=True)
    for name, write in sheets.items():
        with atomic_write(out / name) as file:
            write(file)
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary(statistics), markup=False)
    for note in notes:
        console.print(note, markup=False)
    console.print(f"wrote {', '.join(str(out / name) for name in sheets)}", markup=False)


def _bands(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--bands is {text!r}; name one channel or three, counted from 0, such as 3,2,1")
    return tuple(int(part) for part in parts)
