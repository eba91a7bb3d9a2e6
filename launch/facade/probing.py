"""How good frozen features are: `selfsight probe` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipelines.packing.grouping import Grouping
from launch.own_data import shards_of


class ProbeResults(dict[str, Any]):
    """What the probe's JSON file holds; printed, it is the table of `selfsight probe`."""

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        from eval.report import probe_table

        console = Console(file=StringIO(), width=100)
        console.print(probe_table(dict(self)))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        """For notebooks."""
        from eval.report import markdown_table

        return markdown_table(dict(self))

    def accuracy(self, row: str = "pretrained") -> dict[str, float]:
        """Accuracy in 0 .. 1 by column: `row` is pretrained, untrained, raw pixels or chance."""
        from eval.report import read_results

        told = read_results(dict(self))
        rows = dict(told.rows)
        if row not in rows:
            raise ValueError(f"row is {row!r}; there are {', '.join(rows)}")
        cells = zip(told.columns, rows[row], strict=True)
        return {column: float(cell.share) for column, cell in cells if cell is not None}


def probe(
    target: str | Path,
    data: str | Path,
    *,
    val_share: float = 0.0,
    group_pattern: str | None = None,
    group_column: str | None = None,
    progress: bool = False,
    **options: Any,
) -> ProbeResults:
    """Measure a frozen encoder by k-NN and linear probes, beside chance, raw pixels and the same encoder untrained.

    Args:
        target: A run, a checkpoint, an encoder folder, an export, or `timm:NAME`.
        data: Labelled shards with a train and a val split; or images, which are packed into the cache.
        val_share: Of images without a val of their own: the share of each class to test on.
        group_pattern: What train and val must not share, as a regular expression on paths.
        group_column: The same as a column of a table.
        progress: Show bars.
        options: Those of `eval.probe.run_probe`: epochs, seeds, also, image_size, batch_size, device and so on.

    Raises:
        FileNotFoundError, ValueError: Before any work, where target or data do not allow a probe.
    """
    shards = shards_of(str(data), Grouping(val_share, group_pattern, group_column), print, progress)
    from eval.probe import run_probe

    return ProbeResults(run_probe(str(target), shards, progress=progress, **options))
