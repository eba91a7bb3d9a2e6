"""What `selfsight data trace` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer

from data_pipelines.images.issues import visible


def print_trace(
    target: str, overrides: Sequence[str], step: int, rank: int | None, world_size: int, crops: bool, as_json: bool
) -> None:
    """The rows of a step; see `pretrain.stream.trace.Trace.rows`."""
    from pretrain.stream.trace import Trace

    trace = Trace(target, overrides)
    if trace.run is not None and step >= trace.reached:
        typer.echo(
            f"{trace.run} has {trace.reached:,} steps in its newest checkpoint; step {step:,} is what it is going to "
            "see, if its data stay as they are",
            err=True,
        )
    rows = trace.rows(step, rank, world_size, crops)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    texts = ({name: _text(value) for name, value in row.items()} for row in rows)
    if sys.stdout.isatty():
        _print_table(texts)
    else:
        for number, row in enumerate(texts):
            if not number:
                typer.echo("\t".join(row))
            typer.echo("\t".join(row.values()))


def _print_table(rows: Iterator[Mapping[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(rows)
    table = Table(*first, box=None, pad_edge=False)
    for row in (first, *rows):
        table.add_row(*row.values())
    Console(highlight=False).print(table, markup=False)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    # a key may hold anything that a file's name may: a line and a column stay one, and what is no text is written out
    return visible(text.replace("\\", "\\\\").replace("\n", "\\n"))
