"""Settings of a preset for fine-tuning that follow the task, the length and the data, where the user typed none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.wording import counted
from pretrain.config import Config

Settings = dict[str, Any]


def of_task(preset: Config, given: Mapping[str, str], channels: int, bits: int) -> tuple[Settings, list[str]]:
    """What the preset's method goes without for the task that is `given`, and for images of so many channels and bits;
    and a line for each reason."""
    method = preset.method
    if "method" in given:  # all of it is typed
        return {}, []
    task = given.get("method.task", method.task)
    unfit = {key: value for key, value in method.unfit(task).items() if not _is_typed(f"method.{key}", given)}
    settings: Settings = {f"method.{key}": value for key, value in unfit.items()}
    lines = [f"for task {task}: {_listed(settings)} in place of the preset's"] if settings else []
    colours = {"method.rand_augment": "null"}
    if (
        (channels, bits) != (3, 8)
        and method.rand_augment is not None
        and not {*colours} & {*settings}
        and not _is_typed("method.rand_augment", given)
    ):
        settings |= colours
        lines.append(f"for {counted(channels, 'channel')} of {bits} bits: {_listed(colours)} in place of the preset's")
    return settings, lines


def of_epochs(preset: Config, given: Mapping[str, str], epochs: float | None) -> tuple[Settings, list[str]]:
    """The warm-up of a run of so many epochs, where that is fewer than the preset's: the same share of it."""
    warmup, usual = preset.optim.warmup_epochs, preset.train.epochs
    if epochs is None or not warmup or _is_typed("optim.warmup_epochs", given) or epochs <= 0:
        return {}, []
    if usual is None or epochs >= usual:
        return {}, []
    shorter = float(f"{warmup * epochs / usual:.4g}")
    length = f"{epochs:.4g} epoch{'s' * (epochs != 1)}"
    line = f"for {length}: optim.warmup_epochs={shorter:g} in place of the {warmup:g} of {usual:g}"
    return {"optim.warmup_epochs": shorter}, [line]


def of_samples(config: Config, given: Mapping[str, str], num: int, world_size: int) -> tuple[Settings, list[str]]:
    """A batch of at most half of so few images, where one is larger than all of them."""
    batch = config.train.batch_size
    if num >= batch or _is_typed("train.batch_size", given):
        return {}, []
    unit = world_size * config.train.grad_accum_steps * config.data.repeated_augmentation
    unit *= 2 if config.method.mixes else 1  # pairs that are mixed
    if unit > num:
        return {}, []
    smaller = unit
    while 2 * smaller <= num // 2:
        smaller *= 2
    return {"train.batch_size": smaller}, [f"for {num:,} images: train.batch_size={smaller} in place of {batch}"]


def typed_epochs(given: Mapping[str, str]) -> float | None:
    """The epochs that the user typed; None where there are none, or no number, which the schema refuses."""
    try:
        return float(given["train.epochs"])
    except (KeyError, ValueError):
        return None


def _is_typed(key: str, given: Mapping[str, str]) -> bool:
    """Whether the user set a setting, a part of it, or all of its section."""
    section = key.partition(".")[0]
    return section in given or any(name == key or name.startswith(f"{key}.") for name in given)


def _listed(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def overrides_of(settings: Mapping[str, Any]) -> Sequence[str]:
    """As they are written on the command line."""
    return [f"{key}={value}" for key, value in settings.items()]
