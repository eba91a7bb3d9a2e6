"""The `selfsight` commands that look after runs, on a cluster or not: preflight, status, logs, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.data_commands import changes_of

PREFLIGHT_EXAMPLES = (
    "Examples:\n\n[bold]selfsight preflight mae_vit_cifar_cpu --data shards/ --nproc 2[/]\n\n"
    "[bold]srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 selfsight preflight my.yaml[/]"
)
STATUS_EXAMPLES = (
    "Examples:\n\n[bold]selfsight status[/]\n\n[bold]selfsight status runs/photos --watch 10[/]"
    "\n\n[bold]selfsight status /shared/runs --json[/]"
)
LOGS_EXAMPLES = (
    "Examples:\n\n[bold]selfsight logs runs/photos[/]\n\n[bold]selfsight logs runs/photos --first-error[/]"
    "\n\n[bold]selfsight logs runs/photos --rank 17 --lines 200[/]"
)
CANCEL_EXAMPLES = "Examples:\n\n[bold]selfsight cancel runs/photos[/]\n\n[bold]selfsight cancel runs/sweep --now[/]"


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
        from launch.local import launch_local, python_module

        raise typer.Exit(launch_local(python_module("launch.cluster.preflight", *given), nproc))
    from launch.cluster.preflight import main

    raise typer.Exit(main(given))


def status(
    places: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="Runs, or folders of runs.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON: numbers, times in seconds, null for unknown.")
    ] = False,
    watch: Annotated[float | None, typer.Option(min=0.5, help="Again every so many seconds.")] = None,
) -> None:
    """Show runs and their jobs: state, step, loss, speed, time left, last checkpoint, restarts, logs."""
    from launch.cluster.status import show

    if places is None and not Path("runs").is_dir():
        raise FileNotFoundError("there is no folder runs here; name a run, or the folder of many: selfsight status DIR")
    show(places or [Path("runs")], as_json, watch)


def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    rank: Annotated[int | None, typer.Option(min=0, help="What this rank printed; default: the job's log.")] = None,
    first_error: Annotated[
        bool, typer.Option("--first-error", help="The rank that failed first, and what it said.")
    ] = False,
    lines: Annotated[int, typer.Option(min=1, help="So many, from the end.")] = 40,
) -> None:
    """Show what a run's job printed, or one of its ranks, or who failed first and why."""
    from launch.cluster.logs import lines_of

    for line in lines_of(run, rank, first_error, lines):
        typer.echo(line)


def cancel(
    places: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Runs, or the folder of a sweep: all of its runs.")
    ],
    now: Annotated[bool, typer.Option("--now", help="Without a checkpoint.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end.")] = 900.0,
) -> None:
    """Stop a run with a checkpoint, for good: it does not go back into the queue, and its probes are cancelled.

    Submitted again, it continues from the checkpoint.
    """
    from launch.cluster.cancel import cancel as end

    end(places, now, wait, typer.echo)
