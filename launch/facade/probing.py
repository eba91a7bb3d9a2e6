"""How good frozen features are: `selfsight probe` from Python."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from data_pipelines.packing.grouping import Grouping
from eval.base import LabelKind
from launch.own_data import shards_of


class ProbeResults(dict[str, Any]):
    """What the probe's JSON file holds; printed, it is the table of `selfsight probe`."""

    def __str__(self) -> str:
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
        """Accuracy in 0 .. 1 by column, such as `k-NN class`: `row` is pretrained, untrained, raw pixels or chance."""
        from eval.report import read_results

        told = read_results(dict(self))
        rows = dict(told.rows)
        if row not in rows:
            raise ValueError(f"row is {row!r}; there are {', '.join(rows)}")
        cells = zip(told.columns, rows[row], strict=True)
        return {column.rstrip("*"): float(cell.share) for column, cell in cells if cell is not None}


def probe(
    target: str | Path,
    data: str | Path,
    *,
    val_share: float = 0.0,
    group_pattern: str | None = None,
    group_column: str | None = None,
    val_data: str | Path | None = None,
    group_by: str | None = None,
    epochs: int = 100,
    seeds: int | Iterable[int] = 3,
    untrained_seeds: int | Iterable[int] = 1,
    also: str | Iterable[str] = (),
    only: str | Iterable[str] = (),
    label: str | None = None,
    label_kind: LabelKind | None = None,
    full: bool = False,
    image_size: int | None = None,
    windows: bool = False,
    batch_size: int = 256,
    device: str = "auto",
    out: str | Path | None = None,
    project: str | None = None,
    group: str | None = None,
    progress: bool = True,
) -> ProbeResults:
    """Measure a frozen encoder by k-NN and linear probes, beside chance, raw pixels and the same encoder untrained.

    Args:
        target: A run, a checkpoint, an encoder folder, an export, or `timm:NAME`.
        data: Labelled shards with a train and a val split; or images, which are packed into the cache.
        val_share: Of images without a val of their own: the share of each class to test on.
        group_pattern: What train and val must not share, as a regular expression on paths.
        group_column: The same as a column of a table.
        val_data: Shards to test on, where they do not lie in `data`.
        group_by: A field of each sample's `.json`; samples of one value, as of one patient, stay together; default:
            that by which `data` was packed.
        epochs: Of probes that are trained by steps, such as linear.
        seeds: How many linear probes, or the seed of each.
        untrained_seeds: How many untrained encoders to compare with, or the seed of each.
        also: A further probe, such as `logistic`, or several. only: the same, and none that runs unasked.
        label: A field of each sample's `.json` to predict; default: the sample's class.
        label_kind: `class`, `several` (lists), `number` or `grade`; default: what the label looks like.
        full: The whole grid of probes that have a coarser one, as `logistic`.
        image_size: Side in px of the images; default: what the encoder was trained on.
        windows: See images that are larger than that through sliding windows of that size, not whole.
        batch_size: Images at a time.
        device: `cpu`, `cuda`, one GPU of several as `cuda:1`, or `auto`: a GPU where there is one.
        out: The JSON file; default: in `eval/` of the run.
        project, group: Of wandb, for a target that is no run.
        progress: Say what is done, with bars; False: print nothing. Warnings are in the results either way.

    Raises:
        FileNotFoundError, ValueError: Before any work, where target, data or options do not allow a probe.
    """
    from eval import registry
    from eval.probe import device_named, protocol_of, run_probe
    from pretrain.encoder_folder import check_target

    also, only = ((names,) if isinstance(names, str) else tuple(names) for names in (also, only))
    seeds, untrained_seeds = _seeds(seeds), _seeds(untrained_seeds)
    for name, value in {
        "seeds": len(seeds),
        "epochs": epochs,
        "batch_size": batch_size,
        "image_size": image_size,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; take 1 or more")
    check_target(str(target))  # packing may take hours: what is wrong with the rest is told before it
    registry.check_names((*also, *only))
    if label is None:  # else the data say which probes run
        protocol_of(also, seeds, epochs, full, only, label_kind or "class")
    device = device_named(device)
    with ExitStack() as silence:
        if not progress:  # else a line a step where no bar is shown, and what was packed
            silence.enter_context(redirect_stdout(StringIO()))
            silence.enter_context(redirect_stderr(StringIO()))
        shards = shards_of(str(data), Grouping(val_share, group_pattern, group_column), print, progress)
        results = run_probe(
            str(target),
            shards,
            val_data=None if val_data is None else str(val_data),
            out=None if out is None else Path(out),
            device=device,
            epochs=epochs,
            seeds=seeds,
            untrained_seeds=untrained_seeds,
            also=also,
            only=only,
            label=label,
            label_kind=label_kind,
            full=full,
            group_by=group_by,
            image_size=image_size,
            windows=windows,
            batch_size=batch_size,
            project=project,
            group=group,
            progress=progress,
        )
    return ProbeResults(results)


def _seeds(given: int | Iterable[int]) -> tuple[int, ...]:
    """Seeds that are named, or so many."""
    return tuple(map(int, given)) if isinstance(given, Iterable) else tuple(range(given))
