"""`selfsight pretrain --data photos/`: images are packed once, looked at, and settings chosen for them (no torch)."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from yaml import YAMLError

from data_pipelines.packing.grouping import NO_GROUPS, Grouping
from data_pipelines.packing.spec import holds_images
from launch.ranks import rank_environment
from pretrain.config.own_data import (
    PRESETS,
    Device,
    Start,
    choose,
    choose_method,
    start_of_timm,
    warnings_of,
)
from pretrain.config.yaml_file import parse_yaml

if TYPE_CHECKING:
    from data_pipelines.packing.inspect_images import ImagesSummary


class Prepared(NamedTuple):
    """What to train: a preset, and overrides of it that name the shards; and the command that probes it afterwards."""

    preset: str
    overrides: list[str]
    probe: str | None = None


def prepare(preset: str | None, overrides: Sequence[str], data: str | None, grouping: Grouping) -> Prepared:
    """Make shards of images, and settings of what they are where the preset leaves them open; says what and why.

    Only rank 0 speaks. A run that has begun keeps what was chosen then.

    Raises ValueError and OSError where data, preset or grouping are not as they should be.
    """
    from pretrain.config.load import load_noting

    preset, overrides, data = _asked(preset, overrides, data)
    ranks = rank_environment(os.environ)
    say: Callable[[str], None] = print if ranks.rank == 0 else lambda line: None
    given = dict(override.partition("=")[::2] for override in overrides)
    images = data is not None and holds_images(data)
    own = preset is None or preset in PRESETS.values()
    if preset is not None and not images and not own and grouping == NO_GROUPS:
        return Prepared(preset, _with_data(overrides, data))
    if data is None:
        assert preset is not None
        return Prepared(preset, overrides)  # what is missing, the schema says
    _check_is_there(data)
    if preset is not None:  # a wrong name or setting is told of before anything is packed
        load_noting(preset, _with_data(overrides, data))
    else:
        _check_keys(overrides, given)
    shards = shards_of(data, grouping, say, progress=ranks.rank == 0)
    if not Path(shards).expanduser().is_dir():
        if preset is not None:
            say(f"{preset} is taken as it is: what its settings are chosen from is looked up in a folder only")
            return Prepared(preset, _with_data(overrides, shards))
        raise ValueError(f"--data is {data}; a preset is picked for a folder only, so name one (`pretrain --list`)")
    from data_pipelines.packing.inspect_images import inspect_images

    found = inspect_images(shards)
    say(found_line(found))
    chosen: dict[str, Any] = {}
    if own:
        preset, chosen = _choose(preset, found, given, data, ranks.world_size, say)
    assert preset is not None
    settings = _with_data([*_superseded(chosen, given), *overrides], shards)
    config = load_noting(preset, settings)[0]
    crop = min(min(_sides(view.size)) for view in config.views.global_crops)
    for line in warnings_of(found, crop, config.data.channels, config.data.bits):
        say(f"note: {line}")
    probe = _probe_of(found, data, f"{config.runs}/{config.name}", grouping, say) if images else None
    return Prepared(preset, settings, probe)


def run_folder(preset: str | None, overrides: Sequence[str], data: str | None) -> Path:
    """Where `selfsight pretrain` with these arguments trains, whatever preset is picked where none is named.

    Raises ValueError for what it refuses before it looks at the data.
    """
    from pretrain.config.load import load_config
    from pretrain.config.overrides import written

    preset, overrides, data = _asked(preset, overrides, data)
    if preset is None:  # those that may be picked name no folder, and no other setting has a say in it
        own = [override for override in overrides if override.partition("=")[0].strip() in ("name", "runs")]
        preset, overrides = PRESETS["mae"], [f"name={written(name_for(str(data)))}", *own]
    config = load_config(preset, _with_data(overrides, data))
    return Path(config.runs) / config.name


def _asked(preset: str | None, overrides: Sequence[str], data: str | None) -> tuple[str | None, list[str], str | None]:
    """Each argument in its place; ValueError where images are named as a preset, or neither preset nor data."""
    if preset is not None and "=" in preset:  # the first of the overrides, where no preset is named
        overrides, preset = [preset, *overrides], None
    if preset is not None and data is None and holds_images(preset):
        raise ValueError(f"{preset} is no preset but images; name them as --data {shlex.quote(preset)}")
    data = data or dict(override.partition("=")[::2] for override in overrides).get("data.train")
    if preset is None and data is None:
        raise ValueError(
            "which images? --data photos/ names a folder of them and a preset is picked for it; "
            "or name a preset, which `selfsight pretrain --list` shows, and its --data"
        )
    return preset, list(overrides), data


def _check_is_there(data: str) -> None:
    if "://" not in data and not any(letter in data for letter in "*?[{") and not Path(data).expanduser().exists():
        raise FileNotFoundError(f"--data is {data}, and there is no such file or folder")


def _check_keys(overrides: Sequence[str], given: dict[str, str]) -> None:
    """Refuse a setting that neither of the presets has, of which one is picked when the images have been looked at."""
    from pretrain.config.load import ConfigError, check_override_keys

    method = _method_of(given)
    refusals = []
    for name, preset in PRESETS.items():
        try:
            if method in (None, name):
                check_override_keys(preset, overrides)
                return
        except ConfigError as error:
            refusals.append(error)
    raise refusals[0]


def _method_of(given: dict[str, str]) -> str | None:
    """The method that the user names; ValueError where no preset is picked for it."""
    section = _value(given, "method") or {}
    name = given.get("method.name") or (section.get("name") if isinstance(section, dict) else section)
    if name is not None and name not in PRESETS:
        raise ValueError(
            f"the method is {name}, and a preset is picked for {' and '.join(PRESETS)} only; name one of those that "
            "`selfsight pretrain --list` shows"
        )
    return name


def _value(given: dict[str, str], key: str) -> Any:
    """What a setting is set to; None where it is not, or to no YAML, which the schema tells of."""
    try:
        return parse_yaml(given.get(key, ""))
    except YAMLError:
        return None


def shards_of(data: str, grouping: Grouping, say: Callable[[str], None], progress: bool = True) -> str:
    """`data` where it names shards; the shards of images, packed now or before, where it names those.

    Raises ValueError for a grouping of shards, and what `pack_cached` raises.
    """
    if holds_images(data):
        from data_pipelines.packing.cached import pack_cached

        return str(pack_cached(data, grouping, progress=progress, say=say).folder)
    if grouping != NO_GROUPS:
        raise ValueError("--val-share and --group-... divide images when they are packed, and --data names shards")
    return data


def name_for(data: str) -> str:
    """What a run on `data` is called where neither a preset nor the user names it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).expanduser().resolve().stem)
    return name.strip("-._") or "images"


def found_line(found: ImagesSummary) -> str:
    """What was found, in a line."""
    told = (f"{count} with {number}" for number, count in found.channels.items())
    channels = str(next(iter(found.channels))) if len(found.channels) == 1 else ", ".join(told)
    sides = found.short_side
    return (
        f"found {found.number:,} images to learn from; of {found.looked_at} looked at, short sides "
        f"{sides.least} to {sides.most} px (median {sides.median}), channels {channels}, {found.bits_stored} bits, "
        f"{', '.join(found.formats)}"
        + (f"; {found.num_unreadable} cannot be read, the first {found.unreadable[0]}" if found.unreadable else "")
    )


def device_of(given: dict[str, str]) -> Device:
    """The device that a run will use, as far as can be told without torch."""
    wanted = given.get("engine.device", "auto")
    if wanted in ("cpu", "cuda"):
        return "cpu" if wanted == "cpu" else "cuda"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return "cpu"
    try:
        import pynvml

        pynvml.nvmlInit()
        return "cuda" if pynvml.nvmlDeviceGetCount() else "cpu"
    except Exception:  # no driver: pynvml has a class of error for every reason
        return "cpu"


def _choose(
    preset: str | None,
    found: ImagesSummary,
    given: dict[str, str],
    data: str,
    world_size: int,
    say: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    from pretrain.config.yaml_file import read_yaml

    settings: dict[str, Any] = {}
    if preset is None and "name" not in given:
        settings["name"] = name_for(data)
    name = given.get("name") or settings.get("name") or preset
    stored = Path(given.get("runs", "runs")) / str(name) / "config.yaml"
    begun = read_yaml(stored) if stored.is_file() else None
    device = device_of(given)
    method: Literal["mae", "dino"]
    named = _method_of(given) if preset is None else next(name for name in PRESETS if PRESETS[name] == preset)
    if named is not None:
        method = "mae" if named == "mae" else "dino"
    elif begun is not None and begun["method"]["name"] in PRESETS:
        method = begun["method"]["name"]
    else:
        method, why = choose_method(found, device)
        say(f"preset: {PRESETS[method]} ({why})")
    patch = _value(given, "encoder.patch")
    choice = choose(found, device, method, world_size, _start_of(given), patch if isinstance(patch, int) else None)
    if begun is not None:
        say(f"{stored.parent} has begun: it goes on with the settings that were chosen then")
        settings |= {key: _stored(begun, key, value) for key, value in choice.settings.items()}
    else:
        settings |= choice.settings
        settings["optim.warmup_epochs"] = _warmup(settings, given, found.number)
        length = {"train.epochs", "train.steps", "train.batch_size"} & set(given)
        encoder = any(key == "encoder" or key.startswith("encoder.") for key in given.keys() - {"encoder.patch"})
        for reason in choice.reasons[:-1] if length else choice.reasons:
            if not (encoder and reason.startswith("encoder: ")):  # another than the user asks for
                say(f"  {reason}")
    return choice.preset, settings


def _warmup(settings: dict[str, Any], given: dict[str, str], number: int) -> float:
    """A tenth of the run in epochs, as long as the user makes it."""
    try:
        if given.get("train.steps", "null") == "null":
            return float(given.get("train.epochs", settings["train.epochs"])) / 10
        batch = float(given.get("train.batch_size", settings["train.batch_size"]))
        return round(float(given["train.steps"]) / max(number // batch, 1) / 10, 4)
    except ValueError:  # no number: the schema says what is wrong with it
        return float(settings["optim.warmup_epochs"])


def _start_of(given: dict[str, str]) -> Start | None:
    """What the weights that `init_from` names decide."""
    source = given.get("init_from")
    if not source or source == "null":
        return None
    from pretrain.encoder_folder import TIMM_PREFIX, find_encoder

    if source.startswith(TIMM_PREFIX):
        return start_of_timm(source)
    from data_pipelines.files import read_json

    folder = find_encoder(Path(source).expanduser())
    card = read_json(folder / "config.json") if folder.is_dir() else None
    if not isinstance(card, dict) or "encoder" not in card:
        return None
    encoder = card["encoder"]
    return Start(encoder, min(card["image_size"]), encoder.get("patch", 32) if encoder["family"] == "vit" else 32)


def _stored(begun: Any, key: str, value: Any) -> Any:
    """The value of a setting in a stored configuration; `value` where it has none."""
    node = begun
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return value
    return node


def _superseded(chosen: dict[str, Any], given: dict[str, str]) -> list[str]:
    """What was chosen, without what the user decides: by the same key, by a shortcut, or by another encoder."""
    from pretrain.config.overrides import written

    gone: set[str] = set(given)
    if {"image_size", "crop_size"} & gone:
        gone.add("views.global_crops")
    if {"encoder", "encoder.family"} & gone:
        gone |= {key for key in chosen if key.partition(".")[0] == "encoder"}
    if "train.steps" in gone:
        gone.add("train.epochs")
    return [f"{key}={written(value)}" for key, value in chosen.items() if not _is_in(key, gone)]


def _is_in(key: str, gone: set[str]) -> bool:
    """Whether a setting is set by its own name, by a section's that it is in, or for all of a list."""
    parts = key.split(".")
    named = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return bool(named & gone) or ".".join(part for part in parts if not part.isdigit()) in gone


def _with_data(overrides: Sequence[str], data: str | None) -> list[str]:
    kept = [override for override in overrides if data is None or not override.startswith("data.train=")]
    return kept + ([f"data.train={data}"] if data is not None else [])


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _probe_of(found: ImagesSummary, data: str, run: str, grouping: Grouping, say: Callable[[str], None]) -> str | None:
    """The command that measures the encoder afterwards; says what it tests on, or what is missing for it."""
    if not found.classes or found.classes == 1:
        there = "labels of one class" if found.classes else "no labels"
        say(f"{there}: training needs none; a probe needs two classes (a folder each, or a list with a label column)")
        return None
    options = "".join(
        f" --{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in grouping._asdict().items() if value
    )
    held = next((split for split in ("val", "test") if split in found.splits), None)
    if held is None:
        say(
            f"labels of {found.classes} classes are for the probe only, and nothing is held back to test on: "
            "add --val-share 0.1 (and --group-pattern where images belong together) to hold some back, and name=... "
            "where this run has begun already"
        )
        return None
    command = f"selfsight probe {shlex.quote(run)} --data {shlex.quote(data)}{options}"
    say(
        f"labels of {found.classes} classes are for the probe only; afterwards `{command}` tests on the "
        f"{found.splits[held]:,} images of {held}"
    )
    return command
