"""`selfsight finetune`: an encoder trained on with labels, by a preset, from what TARGET is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from data_pipelines.packing.grouping import Grouping
from launch.data_commands import GroupColumn, GroupPattern, ValShare
from launch.pretrain_command import show_plan, train
from launch.ranks import rank_environment

if TYPE_CHECKING:
    from pretrain.config import Config

FINETUNE_EXAMPLES = (
    "Examples:\n\n[bold]selfsight finetune runs/photos --data shards/[/]\n\n"
    "[bold]selfsight finetune imported/mae_b --data imagenet/ finetune_mae_vitb16_in1k train.grad_accum_steps=4[/]\n\n"
    "[bold]selfsight finetune runs/xrays --data xrays/ method.label=diagnosis method.lora.rank=8[/]\n\n"
    "[bold]selfsight finetune none --data shards/ finetune_simple_vits16_in1k[/]"
)
OWN_DATA = "finetune_own_data"
FROM_SCRATCH = "none"
_NO_ENCODER = (
    f"{FROM_SCRATCH} begins with no weights, so a preset must say which encoder: `selfsight pretrain --list` shows "
    "those that begin with finetune_"
)


def finetune(
    target: Annotated[
        str,
        typer.Argument(help="A run, a checkpoint, an encoder folder or timm:MODEL; or none, to begin with no weights."),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET] [KEY=VALUE]...",
            help="A preset of method finetune, or the path of a .yaml file, and changes to it.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled shards with a train and a val split; or images as `pack` takes.")
    ] = None,
    val_share: ValShare = 0.0,
    group_pattern: GroupPattern = None,
    group_column: GroupColumn = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Fine-tune an encoder on labels; the same command again continues.

    A run like any other: one process, or many under srun, torchrun or `selfsight launch`.
    """
    given = list(arguments or ())
    preset = given.pop(0) if given and "=" not in given[0] else None
    chosen = prepare(target, preset, given, data, Grouping(val_share, group_pattern, group_column))
    if dry_run:
        show_plan(chosen.preset, chosen.overrides)
    else:
        train(chosen.preset, chosen.overrides)


class Chosen(NamedTuple):
    """A preset of `selfsight pretrain`, and overrides of it that name the shards, the weights and their encoder."""

    preset: str
    overrides: list[str]


def prepare(target: str, preset: str | None, overrides: Sequence[str], data: str | None, grouping: Grouping) -> Chosen:
    """The run that fine-tunes `target`. Images are packed once. What follows from the task, the length and the number
    of images is told.

    Raises ValueError and OSError where target, preset or data are not as they should be.
    """
    from launch.own_data import shards_of
    from pretrain.config.load import load_config
    from pretrain.config.overrides import written

    given = dict(override.partition("=")[::2] for override in overrides)
    data = data or given.get("data.train")
    if data is None:
        raise ValueError(
            "which images? --data shards/ names labelled ones, or a folder with a folder of images a class"
        )
    if target == FROM_SCRATCH and preset is None:
        raise ValueError(_NO_ENCODER)
    settings = {} if target == FROM_SCRATCH else start_of(target, keep_size=preset is not None)
    preset = preset or OWN_DATA
    config = load_config(preset, ["data.train=x"])  # a wrong name is told of before anything is packed
    if config.method.name != "finetune":
        raise ValueError(
            f"{preset} is a preset of method {config.method.name}, which learns without labels; `selfsight pretrain "
            "--list` shows those that begin with finetune_"
        )
    if "encoder" in settings:
        settings["encoder"] = _encoder(settings["encoder"], config.encoder)
    say = print if rank_environment(os.environ).rank == 0 else lambda line: None
    shards = shards_of(data, grouping, say, progress=rank_environment(os.environ).rank == 0)
    typed = [*(override for override in overrides if not override.startswith("data.train=")), f"data.train={shards}"]
    own = [f"{key}={written(value)}" for key, value in settings.items() if key not in given]
    return Chosen(preset, [*own, *_following(preset, config, [*own, *typed], given, say), *typed])


def _following(
    preset: str, config: Config, overrides: list[str], given: dict[str, str], say: Callable[[str], None]
) -> list[str]:
    """Overrides that follow from others and from the data, where the user typed none; each is told."""
    from launch.finetune_defaults import of_epochs, of_samples, of_task, overrides_of, typed_epochs
    from pretrain.config.load import load_config
    from pretrain.stream.datasets import training_datasets

    shown = dict(override.partition("=")[::2] for override in overrides)
    channels, bits = (
        int(told) if (told := shown.get(f"data.{key}", "")).isdigit() else getattr(config.data, key)
        for key in ("channels", "bits")
    )
    found, lines = of_task(config, given, channels, bits)
    warmup, more = of_epochs(config, given, typed_epochs(given))
    found, lines = found | warmup, lines + more
    resolved = load_config(preset, [*overrides_of(found), *overrides])
    num = sum(dataset.num_samples for dataset in training_datasets(resolved))
    batch, more = of_samples(resolved, given, num, rank_environment(os.environ).world_size)
    found, lines = found | batch, lines + more
    if "train.steps" in given and resolved.train.steps is not None:
        epochs = resolved.train.steps * batch.get("train.batch_size", resolved.train.batch_size) / num
        warmup, more = of_epochs(config, given, epochs)
        found, lines = found | warmup, lines + more
    for line in lines:
        say(line)
    return list(overrides_of(found))


def finetune_folder(target: str, preset: str | None, overrides: Sequence[str]) -> Path:
    """Where the run of `prepare` with these arguments trains; raises what that refuses before it looks at the data."""
    from pretrain.config.load import load_config
    from pretrain.config.overrides import written

    if preset is None and target == FROM_SCRATCH:
        raise ValueError(_NO_ENCODER)
    own = [] if target == FROM_SCRATCH else [f"name={written(start_of(target, keep_size=True)['name'])}"]
    named = [override for override in overrides if override.partition("=")[0].strip() in ("name", "runs")]
    config = load_config(preset or OWN_DATA, ["data.train=x", *own, *named])
    return Path(config.runs) / config.name


def start_of(target: str, keep_size: bool) -> dict[str, Any]:
    """Settings that an encoder decides of the run that goes on with it.

    keep_size: images of the preset's size rather than of that it was trained with.
    """
    from pretrain.encoder_folder import TIMM_PREFIX, check_target, find_encoder

    check_target(target)
    name = target.removeprefix(TIMM_PREFIX) if target.startswith(TIMM_PREFIX) else _name_of(Path(target))
    settings: dict[str, Any] = {"name": f"{name}-finetune", "init_from": target}
    if target.startswith(TIMM_PREFIX):
        return settings | {"encoder": {"family": "timm", "model": name}}
    from pydantic import TypeAdapter

    from pretrain.config import EncoderConfig
    from pretrain.encoders.saved import read_card

    card = read_card(find_encoder(Path(target).expanduser()))
    settings["encoder"] = TypeAdapter(EncoderConfig).dump_python(card.encoder, mode="json")
    settings |= {"data.channels": card.channels, "data.bits": card.bits}
    return settings if keep_size else settings | {"views.global_crops.0.size": list(card.image_size)}


def _encoder(theirs: dict[str, Any], preset: Any) -> dict[str, Any]:
    """The target's encoder, with what a preset for fine-tuning decides of it: fixed positions may be learned on,
    windows follow the size of the images, and drop path is another than while it was pretrained."""
    kept = {"drop_path": preset.drop_path}
    if preset.family == theirs["family"]:
        kept |= {key: getattr(preset, key) for key in ("window", "positions") if hasattr(preset, key)}
        if theirs.get("positions") == "learned":
            kept["positions"] = "learned"
    return theirs | kept


def _name_of(path: Path) -> str:
    """Of the run, where a checkpoint or an encoder folder of it is named."""
    path = path.expanduser().resolve()
    for part in ("encoder", "best"):
        path = path.parent if path.name == part else path
    if path.parent.name == "checkpoints":
        path = path.parents[1]
    return path.stem
