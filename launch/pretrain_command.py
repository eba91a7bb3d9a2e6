"""`selfsight pretrain`: the list of presets, the plan of a run, and a safe start of training."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipelines.packing.grouping import Grouping
from data_pipelines.wording import counted
from launch.data_commands import GroupColumn, GroupPattern, ValShare
from launch.ranks import check_gpus, rank_environment

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from data_pipelines.sampler import Sampler
    from pretrain.config import Config

PRETRAIN_EXAMPLES = (
    "Examples:\n\n[bold]selfsight pretrain --data photos/ --val-share 0.1[/]\n\n"
    "[bold]selfsight pretrain --list[/]\n\n"
    "[bold]selfsight pretrain mae_vit_cifar_cpu --data shards/[/]\n\n"
    "[bold]selfsight pretrain my.yaml train.epochs=100 name=longer[/]\n\n"
    '[bold]torchrun --nproc-per-node 8 "$(command -v selfsight)" pretrain my.yaml[/]'
)


def pretrain(
    preset: Annotated[
        str | None, typer.Argument(help="A preset's name, or the path of a .yaml file; default: picked for the images.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the preset.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Shards (short for data.train=PATH), or images as `pack` takes: packed once.")
    ] = None,
    val_share: ValShare = 0.0,
    group_pattern: GroupPattern = None,
    group_column: GroupColumn = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the presets and stop.")] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Write a trace of steps 10 to 12, or of tracking.profile_steps=[A,B], into the run's profile/.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Pretrain an encoder; the same command again continues a run.

    One process by itself, or one of many under srun, torchrun, the deepspeed launcher or `selfsight launch`.
    """
    if list_:
        print_presets()
        return
    from launch.own_data import prepare

    overrides = list(overrides or ())
    if profile and not any(override.startswith("tracking.profile_steps=") for override in [preset or "", *overrides]):
        overrides.append("tracking.profile_steps=[10,12]")
    chosen = prepare(preset, overrides, data, Grouping(val_share, group_pattern, group_column))
    if dry_run:
        show_plan(chosen.preset, chosen.overrides)
    else:
        train(chosen.preset, chosen.overrides)
        if chosen.probe is not None and rank_environment(os.environ).rank == 0:
            print(f"next: {chosen.probe}", flush=True)


def print_presets() -> None:
    """A table of the shipped presets."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.config.load import list_presets

    table = Table("preset", "what it is", box=None, pad_edge=False)
    for preset in list_presets():
        table.add_row(preset.name, preset.description)
    Console().print(table)


def train(preset: str, overrides: Sequence[str]) -> None:
    """Train on every rank that was started; see `pretrain.run.pretrain` for the errors and exit codes."""
    from pretrain.config.load import check_batch, load_noting
    from pretrain.quiet import quiet_profiler
    from pretrain.stream.datasets import training_datasets
    from pretrain.survival.startup import StartUp
    from pretrain.survival.stopping import EXIT_TROUBLE, StopRequest

    early = StopRequest.install()  # importing torch takes seconds, and a signal then must not kill the job
    startup = StartUp(preset=preset)
    startup.mark("command")
    # millions of objects are made that stay: looking for garbage among them would take a quarter of the imports' time
    gc.disable()
    ranks = rank_environment(os.environ)
    config, notes = load_noting(preset, overrides)
    if notes and ranks.rank == 0:
        print("\n".join(notes), flush=True)
    if config.engine.device != "cpu":
        check_gpus(os.environ, ranks)
    ranks.export(os.environ)
    check_batch(config, ranks.world_size)
    startup.mark("config")
    datasets = training_datasets(config)  # so that data which are missing are told of at once
    startup.mark("data")
    # a reader of the progress lines can't act on torch's notes about its own future names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    quiet_profiler(os.environ)
    for package in ("torch", "timm"):  # apart from the rest, for the record of what takes how long
        import_module(package)
        startup.mark(f"import {package}")
    from pretrain.run import pretrain

    startup.mark("import selfsight")
    folder = Path(config.runs) / config.name
    try:
        pretrain(config, early, startup, datasets)  # a stop requested by now is agreed on by all in the first step
    except SystemExit as end:
        if end.code == EXIT_TROUBLE:  # not where it was asked to stop: its time may be short
            _report(folder)
        raise
    _report(folder)


def _report(folder: Path) -> None:
    """The page of a run that has come to its end, by one rank."""
    if os.environ.get("RANK", "0") == "0":
        from launch.report.page import refresh

        page = refresh(folder)
        if page is not None:
            print(f"its curves, pictures and history are in {page}", flush=True)


@dataclass(frozen=True)
class Checked:
    """A run of which all that can be known without starting it is known, and allowed."""

    config: Config  # with what it left open decided
    datasets: Sequence[Dataset]
    sampler: Sampler
    chosen: list[str]  # a line for each such decision


def check_run(config: Config, world_size: int) -> Checked:
    """Everything about a run on so many ranks that can be refused before it starts; opens the data, writes nothing.

    Raises ValueError (ConfigError for settings) and OSError with what is wrong, what is allowed and what to do.
    """
    from pretrain.checkpoints.folder import check_continues
    from pretrain.config.auto_hparams import resolve_auto
    from pretrain.config.load import check_batch, check_sources
    from pretrain.engines.schedules import Timeline, check_warmup
    from pretrain.stream.datasets import data_lines, sampler_of, training_datasets

    check_batch(config, world_size)
    check_continues(Path(config.runs) / config.name, config.checkpoint)
    datasets = training_datasets(config)
    config, chosen = resolve_auto(config, sum(dataset.num_samples for dataset in datasets))
    sampler = sampler_of(config, datasets)
    timeline = Timeline.of(config.train, sampler.steps_per_epoch)
    check_warmup(config.optim, timeline)
    # from here on torch is imported, which takes seconds, and a minute from a slow disk
    from data_pipelines.transforms.backends.any_channels import left_out_line
    from pretrain.diagnostics.knn import named_data
    from pretrain.encoders.supported import check_encoder
    from pretrain.interop.initialise import check_init_from
    from pretrain.start_checks import check_profile
    from pretrain.stream.loading import resolve_backend
    from pretrain.stream.normalisation import choose_normalisation, resolve_normalisation

    check_profile(config, timeline.total_steps)
    check_sources(config)
    named_data(config)
    check_encoder(config)
    check_init_from(config)
    config, known = resolve_normalisation(config)
    config = resolve_backend(config)
    chosen += known + left_out_line(config.views, config.data.channels) + data_lines(config, datasets)
    choose_normalisation(config, datasets)
    return Checked(config, datasets, sampler, chosen)


def show_plan(preset: str, overrides: Sequence[str]) -> None:
    """Print the resolved configuration and what follows from it; starts and writes nothing."""
    from pretrain.config.load import dump_config, load_noting

    world_size = rank_environment(os.environ).world_size
    config, notes = load_noting(preset, overrides)
    checked = check_run(config, world_size)
    print(dump_config(checked.config))
    print("\n".join(f"# {line}" for line in notes + checked.chosen + plan_of(checked, world_size)))


def plan_of(checked: Checked, world_size: int) -> list[str]:
    """The arithmetic of a checked run, in words."""
    sampler = checked.sampler
    return plan(checked.config, sampler.summary(), sampler.steps_per_epoch, world_size)


def plan(config: Config, data: str, steps_per_epoch: float, world_size: int) -> list[str]:
    """The arithmetic of a run on so many ranks, in words; `data` says what it is shown."""
    from pretrain.engines.schedules import Timeline, learning_rate

    batch, accumulation = config.train.batch_size, config.train.grad_accum_steps
    micro_batch = batch // (world_size * accumulation)
    timeline = Timeline.of(config.train, steps_per_epoch)
    rate = learning_rate(config.optim, batch, timeline)
    every = config.checkpoint.every_epochs
    also = "" if every is None else f" and every {every:g} epochs"
    share = f"{batch} / {config.optim.lr_reference_batch}"
    share = f"sqrt({share})" if config.optim.lr_scaling == "sqrt" else share
    return [
        f"data: {data}",
        f"global batch: {batch} = {counted(world_size, 'rank')} x {micro_batch} x {accumulation} accumulated",
        f"steps: {timeline.total_steps:,}, {steps_per_epoch:,.10g} an epoch, "
        f"{timeline.epoch(timeline.total_steps):.1f} epochs; {timeline.total_steps * batch:,} samples seen",
        f"learning rate: {rate.peak:.3g} at its peak (optim.lr x {share}), "
        f"after {rate.warmup_steps:,} steps of warm-up",
        f"checkpoints: every {config.checkpoint.every_steps:,} steps{also}, in {config.runs}/{config.name}",
    ]
