"""`selfsight launch`: several processes of `selfsight pretrain` or `selfsight embed` on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

LAUNCH_EXAMPLES = (
    "Examples:\n\n[bold]selfsight launch --nproc 2 mae_vit_cifar_cpu --data shards/[/]\n\n"
    "[bold]selfsight launch --nproc 2 embed runs/photos --data shards/ --out features/[/]"
)
#: Commands whose processes share their work; without one of them, the arguments are those of the first.
SHARED = ("pretrain", "embed")


def launch(
    context: typer.Context,
    nproc: Annotated[int, typer.Option(min=1, help="Processes; one a GPU.")],
) -> None:
    """Run `selfsight pretrain ARGUMENTS...`, or `selfsight embed ...`, as several processes on this machine.

    What follows --nproc N is as behind `selfsight pretrain`: a PRESET, KEY=VALUE, --data, --val-share, --profile and
    the others of `selfsight pretrain --help`; or `embed` and what `selfsight embed --help` lists.
    """
    from launch.local import launch_local, python_module

    command = context.args if context.args[:1] and context.args[0] in SHARED else [SHARED[0], *context.args]
    raise typer.Exit(launch_local(python_module("launch", *command), nproc))
