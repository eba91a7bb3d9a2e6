"""The `selfsight data` commands: looking at a data set, and at what a run is shown of it."""

from __future__ import annotations

from typing import Annotated

import typer

data_app = typer.Typer(name="data", no_args_is_help=True, help="Look at a data set, and at what a run sees of it.")

Preset = Annotated[str, typer.Argument(help="A preset's name, or the path of a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it.")]
Data = Annotated[str | None, typer.Option(help="The training shards; short for data.train=PATH.")]


def changes_of(overrides: list[str] | None, data: str | None) -> list[str]:
    """`--data` as one more override."""
    return [*(overrides or ()), *([f"data.train={data}"] if data is not None else [])]


@data_app.command(epilog="Example:\n\n[bold]selfsight data trace mae_vit_cifar_cpu --data shards/ --step 1000[/]")
def trace(
    preset: Preset,
    overrides: Overrides = None,
    data: Data = None,
    step: Annotated[int, typer.Option(min=0, help="Optimizer steps before it.")] = 0,
) -> None:
    """Print which samples make up the batch of a step."""
    from pretrain.config import load_config
    from pretrain.data import open_datasets, sampler_of

    config = load_config(preset, changes_of(overrides, data))
    sampler = sampler_of(config, open_datasets(config.data))
    for number, row in enumerate(sampler.rows(step, range(sampler.batch_size))):
        key, shard = sampler.datasets[row.dataset].key(row.sample)
        typer.echo(f"{number}\t{row.dataset}\t{row.sample}\t{row.epoch}\t{key}\t{shard}")
