"""`selfsight compare A B`: two encoders on the same images, the difference in every measure with its interval."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipelines.packing.grouping import Grouping
from launch.data_commands import Progress

if TYPE_CHECKING:
    from eval.sides import Side

COMPARE_EXAMPLES = (
    "Examples:\n\n[bold]selfsight compare runs/dino runs/mae --data shards/[/]\n\n"
    "[bold]selfsight compare runs/mae timm:vit_small_patch16_224.augreg_in21k --data shards/ --also retrieval[/]\n\n"
    "[bold]selfsight compare runs/a/eval/probe-400-1f.json runs/b/eval/probe-400-2e.json[/]"
)


def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A run, checkpoint or encoder, timm:MODEL, or a result file of `probe`.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    data: Annotated[str | None, typer.Option(help="As of `probe`; not needed between two result files.")] = None,
    val_data: Annotated[str | None, typer.Option(help="The val split, where it is not in DATA.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="A further probe, run where its result is missing; may be repeated.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="The same, and none that runs unasked.")] = None,
    label: Annotated[str | None, typer.Option(help="A field of each sample's .json, as of `probe`.")] = None,
    label_kind: Annotated[str | None, typer.Option(help="As of `probe`.")] = None,
    group_by: Annotated[str | None, typer.Option(help="As of `probe`.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file; default: beside the results of A.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Of probes that are trained by steps.")] = 100,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in px; default: each encoder's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    progress: Progress = True,
) -> None:
    """Say by how much B is better than A in every measure of both, and how sure that is. Missing probes are run."""
    files = [Path(each).expanduser() if each.endswith(".json") else None for each in (first, second)]
    if data is None and None in files:
        name = first if files[0] is None else second
        raise ValueError(f"{name} is no result file, so that --data must say which images to measure it on")
    from launch.probe_command import label_kind_named, refuse_early

    named = [*(also or ()), *(only or ())]
    for each, file in zip((first, second), files, strict=True):
        if file is None:
            data = refuse_early(each, str(data), Grouping(), named)
        elif not file.is_file():
            raise FileNotFoundError(f"{file} is not there; name a result file of eval/, a run or an encoder")
    from rich.console import Console

    from data_pipelines.files import write_json
    from eval.compare import compared
    from eval.sides import side_of

    options: dict[str, Any] = {
        "val_data": val_data, "label": label, "label_kind": label_kind_named(label_kind), "group_by": group_by,
        "also": also or (), "only": only or (), "epochs": epochs, "image_size": image_size, "device": device,
        "batch_size": batch_size, "progress": progress,
    }  # fmt: skip
    sides: list[Side] = []
    places: list[Path] = []
    for each, file in zip((first, second), files, strict=True):
        paths = [file] if file is not None else _results_of(each, str(data), options)
        sides.append(side_of(paths))
        places.append(paths[-1])
    comparison = compared(*sides, seed=seed, draws=draws)
    path = out or _beside(places[0], comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, comparison)
    Console().print(_table(comparison))
    typer.echo(f"wrote {path}")


def _results_of(target: str, data: str, options: dict[str, Any]) -> list[Path]:
    """The result files of a target on these data; the probe is run where one that is wanted is missing."""
    from eval.probe import run_probe
    from eval.registry import chosen
    from eval.result_files import read_result, results_for
    from eval.splits import open_splits
    from eval.target import open_target

    splits = open_splits(
        data, options["val_data"], options["group_by"], options["label"], options["label_kind"],
        unlabelled=bool(options["only"]),
    )  # fmt: skip
    subject = open_target(target, options["image_size"])
    stem = subject.results.stem

    def there() -> list[Path]:
        return results_for(
            subject.results.parent.glob(f"{stem}-*.json"), splits.train.checksum, splits.val.checksum,
            options["label"], options["group_by"], subject.image_size,
        )  # fmt: skip

    wanted = [spec.name for spec in chosen(options["also"], options["only"], splits.labels.kind)]
    known = {name for path in there() for name in read_result(path)["rows"]["pretrained"]}
    missing = [name for name in wanted if name not in known]
    if missing:
        typer.echo(f"{target}: {', '.join(missing)} not measured on {data} yet", err=True)
        run_probe(target, data, **{**options, "only": missing, "also": ()})
    return there()


def _beside(result: Path, comparison: dict[str, Any]) -> Path:
    """Where a comparison is written: a name of what was compared, so that it replaces only its own earlier one."""
    of = [str(comparison[side]) for side in ("first", "second")] + [comparison["data"]["val"]["checksum"]]
    digest = hashlib.sha256("\n".join(of).encode()).hexdigest()[:8]
    step = comparison["first"].get("step")
    return result.with_name(f"compare-{'' if step is None else f'{step}-'}{digest}.json")


def _table(comparison: dict[str, Any]) -> Any:
    """For the terminal."""
    from rich.table import Table

    from eval.compare import rows_of

    names = [comparison[side]["title"] for side in ("first", "second")]
    title = f"{names[1]} (second) against {names[0]} (first)"
    table = Table(title=title, caption="\n".join(comparison["notes"]), caption_justify="left")
    table.add_column("")
    for column in ("first", "second", "difference"):
        table.add_column(column, justify="right")
    table.add_column("")
    lines: Sequence[tuple[str, ...]] = rows_of(comparison)
    for measure, line in zip(comparison["measures"], lines, strict=True):
        table.add_row(*line, style="dim" if measure["more"] else None)
    return table
