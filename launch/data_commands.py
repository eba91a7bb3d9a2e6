"""The `selfsight data` commands: looking at a data set, and at what a run is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.help_text import PlainFlags

data_app = typer.Typer(
    name="data", cls=PlainFlags, no_args_is_help=True, help="Look at a data set, and at what a run sees of it."
)

Preset = Annotated[str, typer.Argument(help="A preset's name, or the path of a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the preset.")]
Data = Annotated[str | None, typer.Option(help="The training shards; short for data.train=PATH.")]
Threads = Annotated[int | None, typer.Option(min=1, help="That decode; default: the cores it may use.")]
ValShare = Annotated[
    float, typer.Option(help="Of images that are packed for this: the share of every class to hold back as val.")
]
GroupPattern = Annotated[
    str | None, typer.Option(help="Likewise: what train and val must not share, as part of a path: '(p[0-9]+)_'.")
]
GroupColumn = Annotated[str | None, typer.Option(help="The same as a column of a table, such as patient.")]
Progress = Annotated[bool, typer.Option(help="Show how far it is, and what came out.")]


def changes_of(overrides: list[str] | None, data: str | None) -> list[str]:
    """`--data` as one more override."""
    return [*(overrides or ()), *([f"data.train={data}"] if data is not None else [])]


@data_app.command(
    epilog="Examples:\n\n[bold]selfsight data trace mae_vit_cifar_cpu --data shards/ --step 1000[/]\n\n"
    "[bold]selfsight data trace runs/photos --step 1000 --rank 3 --world-size 8 --crops --json[/]"
)
def trace(
    target: Annotated[str, typer.Argument(help="A preset's name, the path of a .yaml file, or the folder of a run.")],
    overrides: Overrides = None,
    data: Data = None,
    step: Annotated[int, typer.Option(min=0, help="Optimizer steps before it.")] = 0,
    rank: Annotated[int | None, typer.Option(min=0, help="Only the rows of this rank.")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks that share the batch.")] = 1,
    crops: Annotated[
        bool, typer.Option("--crops", help="Also the crops' parameters and a digest of the mask.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
) -> None:
    """Print which samples the batch of a step is made of: a table, or tab-separated values where it is piped.

    Of a run it is what was shown, or will be: with the data that were its own at that step.
    """
    from launch.trace_command import print_trace

    print_trace(target, changes_of(overrides, data), step, rank, world_size, crops, json)


@data_app.command(
    epilog="Examples:\n\n[bold]selfsight data dedupe shards/ --sheet duplicates.png[/]\n\n"
    "[bold]selfsight data dedupe shards/ --by features --encoder runs/photos[/]\n\n"
    "[bold]selfsight pack photos/ clean/ --leave-out duplicates.jsonl[/]"
)
def dedupe(
    shards: Annotated[
        str, typer.Argument(help="A folder of shards: its train, val and test; or shards by * or {0..9}.")
    ],
    val: Annotated[str | None, typer.Option(help="The val split, where it is not in SHARDS.")] = None,
    by: Annotated[str, typer.Option(help="phash (a perceptual hash) or features (of --encoder).")] = "phash",
    encoder: Annotated[str | None, typer.Option(help="A run, an encoder folder or timm:NAME.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="phash: most bits of 128 that differ (16). features: least cosine (0.9).")
    ] = None,
    mirrored: Annotated[bool, typer.Option("--mirrored", help="Mirror images are duplicates too (phash).")] = False,
    out: Annotated[Path, typer.Option(help="The list of what to leave out.")] = Path("duplicates.jsonl"),
    sheet: Annotated[Path | None, typer.Option(help="Also a PNG of the most doubtful pairs.")] = None,
    device: Annotated[str, typer.Option(help="Of the encoder: auto, cpu or cuda.")] = "auto",
    threads: Threads = None,
    progress: Progress = True,
) -> None:
    """List exact and near duplicates within and between train and val, for `pack` to leave out.

    What duplicates a val image leaves train, never the other way; within a split the larger image stays.
    """
    from launch.dedupe_command import clean

    clean(
        shards, val, by=by, encoder=encoder, threshold=threshold, mirrored=mirrored, out=out, sheet=sheet,
        device=device, threads=threads, progress=progress,
    )  # fmt: skip


@data_app.command(
    epilog="Examples:\n\n[bold]selfsight data show shards/[/]\n\n"
    "[bold]selfsight data show shards/ --preset dino_vit_cifar_cpu[/]\n\n"
    "[bold]selfsight data show shards/ --preset my.yaml views.local_crops.count=4 --step 1000 --out look/[/]"
)
def show(
    shards: Annotated[str, typer.Argument(help="A folder of shards, or shards by * or {000..009}.")],
    overrides: Overrides = None,
    preset: Annotated[str | None, typer.Option(help="Also show its crops: a name, or the path of a .yaml.")] = None,
    out: Annotated[Path, typer.Option(help="The folder that gets the pictures.")] = Path("look"),
    split: Annotated[str, typer.Option(help="Of a folder of shards.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Samples on samples.png, of every class alike.")] = 48,
    rows: Annotated[int, typer.Option(min=1, help="Images on crops.png: the first of the step's batch.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of which samples are drawn.")] = 0,
    step: Annotated[int, typer.Option(min=0, help="Optimizer steps before the batch on crops.png.")] = 0,
    bands: Annotated[str | None, typer.Option(help="Channels shown as red, green, blue: 3,2,1; or one.")] = None,
    threads: Threads = None,
    progress: Progress = True,
) -> None:
    """Draw samples, sizes, shapes and classes, and what a preset's crops look like."""
    from launch.show_command import show as show_data

    show_data(
        shards, out, split=split, preset=preset, overrides=overrides or (), count=count, rows=rows, seed=seed,
        step=step, bands=bands, threads=threads, progress=progress,
    )  # fmt: skip


@data_app.command(
    epilog="Example:\n\n[bold]selfsight data profile dino_vits16_in1k_100 --data shards/ --gpu-rate 3500[/]"
)
def profile(
    preset: Preset,
    overrides: Overrides = None,
    data: Data = None,
    gpu_rate: Annotated[
        float | None, typer.Option(min=1, help="Images a second that a GPU (or all of them) takes.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="About how long to measure; longer is steadier.")] = 12.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the loader of a run: where the time of an image goes, and how many cores feed a GPU."""
    from launch.profile_command import show_profile

    show_profile(preset, changes_of(overrides, data), gpu_rate, seconds, json)


@data_app.command(
    epilog="Examples:\n\n[bold]selfsight data stats shards/[/]\n\n"
    "[bold]selfsight data stats sentinel/ --channels 13 --bits 16 --write[/]"
)
def stats(
    shards: Annotated[str, typer.Argument(help="A folder of shards, a tar, or shards by * or {0..9}.")],
    split: Annotated[str, typer.Option(help="Of a folder.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="Images to measure, at most.")] = 10_000,
    channels: Annotated[
        int | None, typer.Option(min=1, help="Measure as data.channels says; default: what the files have.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Likewise, as data.bits: 8 or 16.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="As data.frames; with several, samples are stacks.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of which images are drawn.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Into the dataset.json beside the shards.")] = False,
    threads: Threads = None,
    progress: Progress = True,
) -> None:
    """Measure mean, deviation and range of every channel; runs normalise by what dataset.json says."""
    import json

    from data_pipelines.datasets.dataset_info import data_stats

    if bits not in (None, 8, 16):
        raise typer.BadParameter(f"{bits}; a channel has 8 or 16 bits", param_hint="--bits")
    found = data_stats(
        shards, split=split, samples=samples, channels=channels, bits=bits, frames=frames, seed=seed, write=write,
        workers=threads, progress=progress,
    )  # fmt: skip
    if not progress:  # for other programs; else it has shown a table
        typer.echo(json.dumps(found, indent=2))
