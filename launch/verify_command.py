"""`selfsight verify`: all that is wrong with a data set, before a run finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.data_commands import Progress

VERIFY_EXAMPLES = "Examples:\n\n[bold]selfsight verify shards/[/]\n\n[bold]selfsight verify --cases[/]"


def verify(
    shards: Annotated[
        str | None, typer.Argument(help="A folder of shards, or shards by * or {000..009}, or a URL.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="The JSON report; default: verify.json in the folder.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a core.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Headers, labels and indexes only; no image.")] = False,
    channels: Annotated[
        int | None, typer.Option(min=1, help="As data.channels of the runs to come; default: any, as they are stored.")
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="As data.frames of the runs to come; with several, samples are stacks.")
    ] = 1,
    cases: Annotated[bool, typer.Option("--cases", help="Show all that can be wrong, and stop.")] = False,
    progress: Progress = True,
) -> None:
    """Find all that is wrong with a data set before a run does; exit code 1 for errors, 0 for notes only."""
    if cases:
        from data_pipelines.images.issues import table

        typer.echo(table())
        return
    if shards is None:
        raise typer.BadParameter("name the shards to verify", param_hint="SHARDS")
    from data_pipelines.checks.verify import verify as verify_shards

    found = verify_shards(
        shards, report=report, workers=workers, quick=quick, channels=channels, frames=frames, progress=progress
    )
    if not found["ok"]:
        if not progress:  # else it has said so itself
            typer.echo("\n".join(found["problems"]), err=True)
        raise typer.Exit(1)
