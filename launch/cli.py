"""The `selfsight` command. Each subcommand imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipelines.cores import sleep_at_barriers
from launch.cluster_commands import SUBMIT_EXAMPLES, submit
from launch.compare_command import COMPARE_EXAMPLES, compare
from launch.dashboard.command import DASHBOARD_EXAMPLES, dashboard
from launch.data_commands import data_app
from launch.embed_command import EMBED_EXAMPLES, embed
from launch.encoder_commands import (
    ENCODERS_EXAMPLES,
    EXPORT_EXAMPLES,
    IMPORT_EXAMPLES,
    encoders,
    export,
    import_,
)
from launch.finetune_command import FINETUNE_EXAMPLES, finetune
from launch.help_text import PlainFlags
from launch.launch_command import LAUNCH_EXAMPLES, launch
from launch.neighbours_command import NEIGHBOURS_EXAMPLES, neighbours
from launch.pack_command import PACK_EXAMPLES, pack
from launch.pretrain_command import PRETRAIN_EXAMPLES, pretrain
from launch.probe_command import PROBE_EXAMPLES, probe
from launch.ranks import after_the_first, rank_of
from launch.run_commands import (
    CANCEL_EXAMPLES,
    LOGS_EXAMPLES,
    PREFLIGHT_EXAMPLES,
    STATUS_EXAMPLES,
    cancel,
    logs,
    preflight,
    status,
)
from launch.settings_command import SETTINGS_EXAMPLES, settings
from launch.verify_command import VERIFY_EXAMPLES, verify
from pretrain.survival.stopping import EXIT_USER_ERROR, is_user_error


class _VisibleFormatter(logging.Formatter):
    """Warnings name shards and samples of strangers: control letters in them are shown, not obeyed by the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        from data_pipelines.images.issues import visible

        return visible(super().format(record))


class _Commands(PlainFlags):
    """The group of subcommands; turns errors that a user can mend into one readable message.

    The convention: our code raises ValueError (also ConfigError) and OSError with a message that names the value,
    what is allowed and what to do. Raised by our own packages, or by the system about a file, they end in
    `error: ...` and exit code 2; SELFSIGHT_TRACEBACK=1 shows the traceback instead. All other exceptions are ours
    to mend and keep their traceback.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if logging.lastResort is not None:  # what writes warnings where no handler is set up, as in every command
            logging.lastResort.setFormatter(_VisibleFormatter())
        try:
            return super().main(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get("SELFSIGHT_TRACEBACK") == "1" or not is_user_error(error):
                raise
            from data_pipelines.images.issues import visible

            rank = rank_of(os.environ)
            after_the_first(rank, EXIT_USER_ERROR)
            typer.secho(f"error on rank {rank}: " if rank else "error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(visible(told(error)), err=True)
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
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Self-supervised pretraining of vision encoders: from tar shards to a probed encoder.",
    epilog="From your own images to a probed encoder:\n\n[bold]selfsight pack[/] photos/ shards/ --val-share 0.05"
    "\n\n[bold]selfsight verify[/] shards/"
    "\n\n[bold]selfsight pretrain[/] PRESET --data shards/\n\n[bold]selfsight probe[/] runs/PRESET --data shards/",
)

app.add_typer(data_app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"selfsight {version('selfsight')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and stop.")
    ] = False,
) -> None:
    """The options of `selfsight` itself."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line `args` (default: this process's own)."""
    sleep_at_barriers(os.environ)  # torch is imported later, by those commands that need it
    app(None if args is None else list(args))


@app.command(epilog="Examples:\n\n[bold]selfsight demo[/]\n\n[bold]selfsight demo --out elsewhere/demo[/]")
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; a second run skips what is there.")] = Path("demo"),
) -> None:
    """Go the whole way on built-in images: pack, verify, pretrain, probe. Minutes on a laptop."""
    from launch.demo import run_demo

    run_demo(out)


app.command(epilog=PACK_EXAMPLES)(pack)
app.command(epilog=VERIFY_EXAMPLES)(verify)
app.command(epilog=PRETRAIN_EXAMPLES)(pretrain)
app.command(epilog=FINETUNE_EXAMPLES)(finetune)
app.command(epilog=SETTINGS_EXAMPLES)(settings)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="--nproc N [PRESET | embed TARGET] [ARGUMENTS]...",
    epilog=LAUNCH_EXAMPLES,
)(launch)


app.command(epilog=SUBMIT_EXAMPLES)(submit)
app.command(epilog=PREFLIGHT_EXAMPLES)(preflight)
app.command(epilog=STATUS_EXAMPLES)(status)
app.command(epilog=LOGS_EXAMPLES)(logs)
app.command(epilog=CANCEL_EXAMPLES)(cancel)
app.command(epilog=EMBED_EXAMPLES)(embed)
app.command(epilog=PROBE_EXAMPLES)(probe)
app.command(epilog=COMPARE_EXAMPLES)(compare)
app.command(epilog=NEIGHBOURS_EXAMPLES)(neighbours)


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
    scenes: Annotated[
        bool, typer.Option("--scenes", help="Two kinds of numerals an image, near and far, and their depths.")
    ] = False,
    side: Annotated[int, typer.Option(min=32, help="Of the images of --scenes, in px.")] = 64,
    shapes: Annotated[bool, typer.Option("--shapes", help="On paper of several shapes, from 1:4 to 4:1.")] = False,
) -> None:
    """Draw the built-in images that the demo learns from, with labels, masks, boxes and counts."""
    from data_pipelines.demo import build_demo
    from data_pipelines.scenes import build_scenes
    from data_pipelines.shapes import build_shapes

    if scenes and shapes:
        raise ValueError("--scenes and --shapes are data sets apart; leave out one of them")
    if shapes:
        build_shapes(out, seed=seed, train=train, val=val, progress=True)
    elif scenes:
        build_scenes(out, seed=seed, train=train, val=val, side=side, progress=True)
    else:
        build_demo(out, seed=seed, train=train, val=val, progress=True)
    typer.echo(f"{train:,} training and {val:,} validation images are in {out}; next: selfsight pack {out} SHARDS")
