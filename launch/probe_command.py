"""`selfsight probe`: a frozen encoder measured, or all milestones of a run while it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer

from data_pipelines.packing.grouping import Grouping
from eval.base import LabelKind
from launch.data_commands import GroupColumn, GroupPattern, Progress, ValShare

PROBE_EXAMPLES = (
    "Examples:\n\n[bold]selfsight probe runs/mae_vit_cifar_cpu --data shards/[/]\n\n"
    "[bold]selfsight probe timm:vit_small_patch16_224.augreg_in21k --data shards/ --also logistic[/]"
)


def probe(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, an encoder folder or a store, or timm:MODEL.")],
    data: Annotated[
        str, typer.Option(help="Labelled shards with a train and a val split; or images as `pack` takes: packed once.")
    ],
    val_data: Annotated[str | None, typer.Option(help="The val split, where it is not in DATA.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file; default: eval/ of the run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    also: Annotated[
        list[str] | None,
        typer.Option(help="A further probe by its name, such as logistic or a plug-in's; may be repeated."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="The same, and none that runs unasked; may be repeated.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="A field of each sample's .json to predict; default: the class of the sample.")
    ] = None,
    label_kind: Annotated[
        str | None,
        typer.Option(help="What the label is: class, several (a list), number or grade; default: what it looks like."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of probes that are trained by steps, such as linear.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Number of linear probes; their spread is reported.")] = 3,
    logistic: Annotated[bool, typer.Option("--logistic", hidden=True, help="The same as --also logistic.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid of probes that have one, as logistic.")] = False,
    untrained_seeds: Annotated[int, typer.Option(min=1, help="Untrained encoders to compare with.")] = 1,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in px; default: the encoder's own.")] = None,
    windows: Annotated[
        bool,
        typer.Option("--windows", help="See larger images through sliding windows of the encoder's size, not whole."),
    ] = False,
    native: Annotated[
        bool, typer.Option("--native", help="Images keep their own shape, in as many patches as the square has.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    precision: Annotated[str, typer.Option(help="auto (bf16 where the device has it), fp32 or bf16.")] = "auto",
    store: Annotated[
        Path | None,
        typer.Option(help="What `selfsight embed` wrote of TARGET and DATA: read, not computed."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="For zero_shot: JSON with templates, and names of classes in words.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="Of wandb, for a TARGET that is no run.")] = None,
    group: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="A field of each sample's .json: those of one value, as of one patient, stay together. "
            "Default: that by which DATA was packed."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Probe the milestone checkpoints of a run while it is trained.")
    ] = False,
    whole_run: Annotated[
        bool, typer.Option("--all", help="All milestones of a run and its final encoder, by every cheap probe.")
    ] = False,
    val_share: ValShare = 0.0,
    group_pattern: GroupPattern = None,
    group_column: GroupColumn = None,
    progress: Progress = True,
) -> None:
    """Measure a frozen encoder: k-NN, linear and further probes, beside chance, raw pixels and an untrained one."""
    data = refuse_early(target, data, Grouping(val_share, group_pattern, group_column), [*(also or ()), *(only or ())])
    kind = label_kind_named(label_kind)
    from rich.console import Console

    from eval.probe import protocol_of, run_probe
    from eval.report import probe_table
    from eval.splits import open_splits
    from launch.report.page import refresh

    # as before there were other probes: the whole grid is logistic regression's unless another probe is named
    named = [*(also or ()), *(["logistic"] if logistic or (full and not also and not only) else [])]
    measure = partial(
        run_probe,
        data=data,
        val_data=val_data,
        device=device,
        epochs=epochs,
        seeds=range(seeds),
        also=named,
        only=only or (),
        full=full,
        group_by=group_by,
        label=label,
        label_kind=kind,
        untrained_seeds=range(untrained_seeds),
        image_size=image_size,
        windows=windows,
        native=native,
        batch_size=batch_size,
        precision=precision,
        store=store,
        project=project,
        group=group,
        progress=progress,
    )
    if windows and (follow or whole_run):
        raise ValueError("--windows is of a single probe; leave it out, or --follow and --all")
    if native and (follow or whole_run):
        raise ValueError("--native is of a single probe; leave it out, or --follow and --all")
    if prompts is not None and (follow or whole_run):
        raise ValueError("--prompts is of a single probe; leave it out, or --follow and --all")
    if follow:
        if store is not None:
            raise ValueError("--store holds features of one encoder and --follow probes many; leave out one of them")
        if out is not None:
            raise ValueError("--out names one file and --follow makes many; leave out one of them")
        from launch.follow_command import end_when_asked, follow_run

        end_when_asked()

        def measure_and_show(checkpoint: str) -> None:
            measure(checkpoint)
            refresh(checkpoint)

        labels = open_splits(data, val_data, group_by, label, kind, unlabelled=bool(only)).labels
        asked = protocol_of(named, range(seeds), epochs, full, only or (), labels.kind).as_json()
        follow_run(Path(target), data, measure_and_show, asked, group_by, label)
        return
    if whole_run:
        if out is not None:
            raise ValueError("--out names one file and --all makes many; leave out one of them")
        from eval import registry
        from launch.all_command import log_overview, overview_table, probe_all

        splits = open_splits(data, val_data, group_by, label, kind, unlabelled=bool(only))
        wanted = [*(only or registry.cheap(splits.labels.kind)), *named]
        asked_of_all = protocol_of((), range(seeds), epochs, full, wanted, splits.labels.kind)
        overview = probe_all(Path(target), splits, asked_of_all, partial(measure, also=()), group_by)
        if overview is not None:
            Console().print(overview_table(overview))
            log_overview(Path(target), overview)
        refresh(target)
        return
    Console().print(probe_table(measure(target, out=out, prompts=prompts)))
    refresh(target)


def label_kind_named(name: str | None, option: str = "--label-kind") -> LabelKind | None:
    """What the option says; typer.BadParameter for another word."""
    if name is None:
        return None
    for kind in get_args(LabelKind):
        if kind == name:
            return kind
    raise typer.BadParameter(f"{option} is {name!r}; it is one of {', '.join(get_args(LabelKind))}")


def refuse_early(target: str, data: str, grouping: Grouping, also: Iterable[str]) -> str:
    """The shards to probe on; what is not there is told before torch is imported, which takes seconds."""
    from eval.store.description import is_store
    from pretrain.encoder_folder import check_target

    if not is_store(target):
        check_target(target)
    from eval import registry

    also = list(also)
    registry.check_names(also)
    from data_pipelines.datasets.dataset import find_shards, open_dataset
    from data_pipelines.datasets.maps import which_have
    from launch.own_data import shards_of

    data = shards_of(data, grouping, partial(typer.echo, err=True))
    if "://" in data:
        return data
    find_shards(data)
    for probe, kind in (("segmentation", "mask"), ("depth", "depth")):
        if probe in also and not which_have(open_dataset(data), kind).any():
            raise ValueError(
                f"no image of train in {data} has a {kind}, and {probe} is a probe of those; pack images with theirs "
                f"(`selfsight pack IMAGES SHARDS --{kind}s FOLDER`)"
            )
    return data
