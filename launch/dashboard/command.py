"""`selfsight dashboard`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

DASHBOARD_EXAMPLES = (
    "Examples:\n\n[bold]selfsight dashboard runs/photos[/]\n\n[bold]selfsight dashboard runs/lr-* --sync[/]\n\n"
    "[bold]selfsight dashboard runs/photos --dry-run[/]"
)


def dashboard(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs of one wandb project.")],
    sync: Annotated[bool, typer.Option("--sync", help="First send what the runs wrote offline.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the layout, ask nobody, and stop.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="With --dry-run: as wandb would get it.")] = False,
    entity: Annotated[str | None, typer.Option(help="wandb's user or team; default: the runs', else yours.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the workspace; default: the group's or the run's.")] = None,
    timeout_minutes: Annotated[float, typer.Option(min=0.1, help="For --sync, for each run.")] = 60.0,
) -> None:
    """Lay out a wandb workspace for runs: curves, throughput, diagnostics, probes, machines, pictures.

    The same command again brings the workspace up to date. Needs a wandb server; `selfsight report` does not.
    """
    from launch.dashboard.layout import as_text, layout_of
    from launch.dashboard.sync import sync as send
    from launch.dashboard.workspace import as_json, save

    layout = layout_of(runs, name)
    layout = replace(layout, entity=entity or layout.entity)
    if dry_run:
        typer.echo(as_json(layout) if json_ else as_text(layout))
        return
    if sync:
        for line in send(runs, timeout_minutes):
            typer.echo(line)
    typer.echo(f"workspace: {save(layout, runs[0])}")
