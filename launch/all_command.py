"""`selfsight probe RUN --all`: every cheap measure of every milestone and of the final encoder, in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from eval.milestones import Overview, overviews, preferred
from eval.result_files import missing, read_result, results_for
from eval.result_tables import tables_of
from launch.follow_command import milestones

if TYPE_CHECKING:
    from rich.table import Table

    from eval.protocol import Protocol
    from eval.splits import Splits


def encoders_of(run: Path) -> list[tuple[int, Path]]:
    """The milestone checkpoints of a run and, last, its final encoder, each with its step.

    FileNotFoundError for what is no run, or has neither yet.
    """
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run, and --all is about one; name it, such as runs/NAME")
    found = {int(path.name.partition("-")[2]): path for path in milestones(run)}
    card = run / "encoder" / "config.json"
    if card.is_file():
        found[int(json.loads(card.read_text(encoding="utf-8"))["step"])] = run
    if not found:
        raise FileNotFoundError(
            f"{run} has no milestone checkpoint and no final encoder yet; train.milestone_epochs says when there are "
            "some, and `selfsight probe RUN` measures the latest checkpoint"
        )
    return sorted(found.items())


def probe_all(
    run: Path, splits: Splits, protocol: Protocol, measure: Callable[..., Any], group_by: str | None
) -> Overview | None:
    """Measure what is missing of each checkpoint, with `measure(target, only=names)`; the table of all of them, or None
    of a single one.

    A result counts where it is of the same data, label and settings.
    """
    asked, used = protocol.as_json(), []
    for step, checkpoint in encoders_of(run):

        def there(step: int = step) -> list[Path]:
            return results_for(
                (run / "eval").glob(f"probe-{step}-*.json"), splits.train.checksum, splits.val.checksum,
                splits.labels.field, group_by,
            )  # fmt: skip

        wanted = missing(there(), asked, [spec.name for spec, _ in protocol.probes])
        if wanted:
            typer.echo(f"step {step:,}: {', '.join(wanted)}", err=True)
            measure(str(checkpoint), only=wanted)
        else:
            typer.echo(f"step {step:,}: measured already", err=True)
        used += there()
    found = overviews([read_result(path) for path in used])
    return found[0] if found else None


def overview_table(overview: Overview) -> Table:
    """For the terminal: measures across, checkpoints down; the best and those not told apart from it are bold."""
    from rich.table import Table

    table = Table(
        title=overview.title, caption="\n".join([*preferred(overview), *overview.notes]), caption_justify="left"
    )
    table.add_column("")
    for place, column in enumerate(overview.columns):
        table.add_column(f"{column} ↓" if place in overview.falling else column, justify="right")
    for place, (name, values) in enumerate(overview.rows):
        cells = [
            "-" if value is None
            else f"[bold]{value._replace(interval=None)}[/]" if place in overview.best[number]
            else str(value._replace(interval=None))
            for number, value in enumerate(values)
        ]  # fmt: skip
        table.add_row(name, *cells)
    return table


def log_overview(run: Path, overview: Overview) -> None:
    """The same, and what the newest checkpoint's results hold beside it, as tables of the run in wandb."""
    from pretrain.tracking.probes import log_tables

    rows: list[Sequence[Any]] = [
        (name, column, None if value is None else value.share, None if value is None else value.error,
         *((None, None) if value is None or value.interval is None else value.interval))
        for name, values in overview.rows
        for column, value in zip(overview.columns, values, strict=True)
    ]  # fmt: skip
    columns = ("what", "measure", "number", "standard error", "low", "high")
    newest = overview.results[-1]
    log_tables(run, newest["target"]["step"], {"probes": (columns, rows), **tables_of(newest)})
