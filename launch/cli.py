"""The `selfsight` command. Each subcommand imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.cluster_commands import SUBMIT_EXAMPLES, submit
from launch.dashboard.command import DASHBOARD_EXAMPLES, dashboard
from launch.data_commands import changes_of, data_app
from launch.encoder_commands import (
    ENCODERS_EXAMPLES,
    EXPORT_EXAMPLES,
    IMPORT_EXAMPLES,
    encoders,
    export,
    import_,
)
from launch.pack_command import PACK_EXAMPLES, pack
from launch.ranks import after_the_first, rank_of
from launch.run_commands import CANCEL_EXAMPLES, PREFLIGHT_EXAMPLES, STATUS_EXAMPLES, cancel, preflight, status
from pretrain.survival.stopping import EXIT_USER_ERROR, is_user_error


class _Commands(TyperGroup):
    """The group of subcommands; turns errors that a user can mend into one readable message.

    The convention: our code raises ValueError (also ConfigError) and OSError with a message that names the value,
    what is allowed and what to do. Raised by our own packages, or by the system about a file, they end in
    `error: ...` and exit code 2; SELFSIGHT_TRACEBACK=1 shows the traceback instead. All other exceptions are ours
    to mend and keep their traceback.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get("SELFSIGHT_TRACEBACK") == "1" or not is_user_error(error):
                raise
            rank = rank_of(os.environ)
            after_the_first(rank, EXIT_USER_ERROR)
            typer.secho(f"error on rank {rank}: " if rank else "error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(told(error), err=True)
            sys.exit(EXIT_USER_ERROR)


def told(error: BaseException) -> str:
    """The message of an error; the system's own about a file without its number, and with what to do."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    advice = {
        errno.EROFS: "; choose a place that can be written to",
        errno.EACCES: "; ask for the right to it, or choose another place",
        errno.ENOSPC: "; make room, or choose another place",
        errno.EDQUOT: "; make room, or choose another place",
    }.get(error.errno, "")
    return f"{error.filename}: {(error.strerror or 'failed').lower()}{advice}"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Self-supervised pretraining of vision encoders: from tar shards to a probed encoder.",
    epilog="From your own images to a probed encoder:\n\n[bold]selfsight pack[/] photos/ shards/ --val-share 0.05"
    "\n\n[bold]selfsight verify[/] shards/"
    "\n\n[bold]selfsight pretrain[/] PRESET --data shards/\n\n[bold]selfsight probe[/] runs/PRESET --data shards/",
)

app.add_typer(data_app)

Progress = Annotated[bool, typer.Option(help="Show how far it is, and what came out.")]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line `args` (default: this process's own)."""
    app(None if args is None else list(args))


@app.command(epilog="Examples:\n\n[bold]selfsight demo[/]\n\n[bold]selfsight demo --out elsewhere/demo[/]")
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; a second run skips what is there.")] = Path("demo"),
) -> None:
    """Go the whole way on built-in images: pack, verify, pretrain, probe. Minutes on a laptop."""
    from launch.demo import run_demo

    run_demo(out)


app.command(epilog=PACK_EXAMPLES)(pack)


@app.command(epilog="Examples:\n\n[bold]selfsight verify shards/[/]\n\n[bold]selfsight verify --cases[/]")
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

    found = verify_shards(shards, report=report, workers=workers, quick=quick, channels=channels, progress=progress)
    if not found["ok"]:
        if not progress:  # else it has said so itself
            typer.echo("\n".join(found["problems"]), err=True)
        raise typer.Exit(1)


@app.command(
    epilog="Examples:\n\n[bold]selfsight pretrain --list[/]\n\n"
    "[bold]selfsight pretrain mae_vit_cifar_cpu --data shards/[/]\n\n"
    "[bold]selfsight pretrain my.yaml train.epochs=100 name=longer[/]\n\n"
    "[bold]torchrun --nproc-per-node 8 -m pretrain my.yaml[/]"
)
def pretrain(
    preset: Annotated[str | None, typer.Argument(help="A preset's name, or the path of a .yaml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the preset.")] = None,
    data: Annotated[str | None, typer.Option(help="The training shards; short for data.train=PATH.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the presets and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Pretrain an encoder; the same command again continues a run.

    One process by itself, or one of many under srun, torchrun, the deepspeed launcher or `selfsight launch`.
    """
    from launch.pretrain_command import print_presets, show_plan, train

    if list_:
        print_presets()
        return
    if preset is None:
        raise ValueError(
            "which preset? `selfsight pretrain --list` shows them; a file of your own is named by its path"
        )
    changes = changes_of(overrides, data)
    if dry_run:
        show_plan(preset, changes)
    else:
        train(preset, changes)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="--nproc N PRESET [ARGUMENTS OF pretrain]...",
    epilog="Example:\n\n[bold]selfsight launch --nproc 2 mae_vit_cifar_cpu --data shards/[/]",
)
def launch(
    context: typer.Context,
    nproc: Annotated[int, typer.Option(min=1, help="Processes; one a GPU.")],
) -> None:
    """Run `selfsight pretrain ARGUMENTS...` as several processes on this machine."""
    from launch.local import launch_local

    raise typer.Exit(launch_local([sys.executable, "-m", "launch", "pretrain", *context.args], nproc))


app.command(epilog=SUBMIT_EXAMPLES)(submit)
app.command(epilog=PREFLIGHT_EXAMPLES)(preflight)
app.command(epilog=STATUS_EXAMPLES)(status)
app.command(epilog=CANCEL_EXAMPLES)(cancel)


@app.command(
    epilog="Examples:\n\n[bold]selfsight probe runs/mae_vit_cifar_cpu --data shards/[/]\n\n"
    "[bold]selfsight probe timm:vit_small_patch16_224.augreg_in21k --data shards/ --also logistic[/]"
)
def probe(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint or an encoder folder, or timm:MODEL.")],
    data: Annotated[str, typer.Option(help="Labelled shards with a train and a val split.")],
    val_data: Annotated[str | None, typer.Option(help="The val split, where it is not in DATA.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file; default: eval/ of the run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    also: Annotated[
        list[str] | None,
        typer.Option(help="A further probe by its name, such as logistic or a plug-in's; may be repeated."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of probes that are trained by steps, such as linear.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Number of linear probes; their spread is reported.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="The whole grid of probes that have one, as logistic.")] = False,
    untrained_seeds: Annotated[int, typer.Option(min=1, help="Untrained encoders to compare with.")] = 1,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in px; default: the encoder's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    project: Annotated[str | None, typer.Option(help="Of wandb, for a TARGET that is no run.")] = None,
    group: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Probe the milestone checkpoints of a run while it is trained.")
    ] = False,
    progress: Progress = True,
) -> None:
    """Measure a frozen encoder: k-NN, linear and further probes, beside chance, raw pixels and an untrained one."""
    from rich.console import Console

    from eval.probe import run_probe
    from eval.report import probe_table
    from launch.report.page import refresh

    measure = partial(
        run_probe,
        data=data,
        val_data=val_data,
        device=device,
        epochs=epochs,
        seeds=range(seeds),
        also=also or (),
        full=full,
        untrained_seeds=range(untrained_seeds),
        image_size=image_size,
        batch_size=batch_size,
        project=project,
        group=group,
        progress=progress,
    )
    if follow:
        if out is not None:
            raise ValueError("--out names one file and --follow makes many; leave out one of them")
        from launch.follow_command import end_when_asked, follow_run

        end_when_asked()

        def measure_and_show(checkpoint: str) -> None:
            measure(checkpoint)
            refresh(checkpoint)

        follow_run(Path(target), data, measure_and_show)
        return
    Console().print(probe_table(measure(target, out=out)))
    refresh(target)


@app.command(
    epilog="Examples:\n\n[bold]selfsight report runs/photos[/]\n\n"
    "[bold]selfsight report runs/lr-1e-3 runs/lr-2e-3 --out sweep.html[/]"
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run's or a sweep's folder; compares several.")
    ],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in that folder.")] = None,
) -> None:
    """Write a run's curves, pictures, probes and history as one HTML page that needs no network."""
    from launch.report.page import write_report

    path = write_report(runs, out)
    typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB); open it in any browser")


app.command(epilog=DASHBOARD_EXAMPLES)(dashboard)


app.command(epilog=EXPORT_EXAMPLES)(export)
app.command(name="import", epilog=IMPORT_EXAMPLES)(import_)
app.command(epilog=ENCODERS_EXAMPLES)(encoders)


@app.command(name="demo-data")
def demo_data(
    out: Annotated[Path, typer.Argument(help="A new folder; gets train/CLASS/*.jpg and val/CLASS/*.jpg.")],
    train: Annotated[int, typer.Option(min=1, help="Number of training images.")] = 6000,
    val: Annotated[int, typer.Option(min=1, help="Number of validation images.")] = 1000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw the built-in labelled images that the demo learns from."""
    from data_pipelines.demo import build_demo

    build_demo(out, seed=seed, train=train, val=val)
