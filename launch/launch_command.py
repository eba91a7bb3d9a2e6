"""`selfsight launch`: several processes of `selfsight pretrain` on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

LAUNCH_EXAMPLES = "Example:\n\n[bold]selfsight launch --nproc 2 mae_vit_cifar_cpu --data shards/[/]"


def launch(
    context: typer.Context,
    nproc: Annotated[int, typer.Option(min=1, help="Processes; one a GPU.")],
) -> None:
    """Run `selfsight pretrain ARGUMENTS...` as several processes on this machine."""
    from launch.local import launch_local, python_module

    raise typer.Exit(launch_local(python_module("launch", "pretrain", *context.args), nproc))
