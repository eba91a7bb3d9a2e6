"""The subcommands for runs on a cluster that look after them: preflight, status, cancel."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from launch.data_commands import changes_of

PREFLIGHT_EXAMPLES = (
    "Examples:\n\n[bold]selfsight preflight mae_vit_cifar_cpu --data shards/ --nproc 2[/]\n\n"
    "[bold]srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 selfsight preflight my.yaml[/]"
)


def preflight(
    preset: Annotated[str, typer.Argument(help="A preset's name, or the path of a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the preset.")] = None,
    data: Annotated[str | None, typer.Option(help="The training shards; short for data.train=PATH.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="As so many processes of this machine.")] = None,
    result: Annotated[
        bool, typer.Option("--result", help="Only end with the code that this job's last preflight came to.")
    ] = False,
) -> None:
    """Check every node before training: code, data, disk, GPUs, clocks, and a sum over all ranks.

    Start it as training will be. Exit code 3: nodes are sick, and named; 1: what all of them share is wrong.
    """
    given = [*(["--result"] if result else []), preset, *changes_of(overrides, data)]
    if nproc is not None:
        from launch.local import launch_local

        raise typer.Exit(launch_local([sys.executable, "-m", "launch.cluster.preflight", *given], nproc))
    from launch.cluster.preflight import main

    raise typer.Exit(main(given))
