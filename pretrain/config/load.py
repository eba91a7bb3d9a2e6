"""From a preset and `key.sub=value` overrides to a checked `Config`, and back to YAML (imports no torch)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from data_pipelines.remote.urls import redact
from pretrain.config import Config
from pretrain.config.combinations import check_tokens
from pretrain.config.errors import ConfigError
from pretrain.config.explain import explain
from pretrain.config.keys import check_keys
from pretrain.config.overrides import apply_overrides
from pretrain.config.yaml_file import read_yaml
from pretrain.encoders.registry import expand_encoder, family_of
from pretrain.methods.registry import LEFT_OUT, METHODS, spec_of

PRESETS = Path(__file__).parents[1] / "presets"
RENAMED_PRESETS = {
    "dino_vits16_own_data": "dino_own_data",
    "beit2_vitb16_in1k_300": "beitv2_vitb16_in1k_300",
    "beit2_vitb16_in1k_1600": "beitv2_vitb16_in1k_1600",
}


class Preset(NamedTuple):
    """A file of `pretrain/presets/`."""

    name: str
    description: str
    path: Path


def list_presets() -> list[Preset]:
    """All shipped presets, by name."""
    found = []
    for path in sorted(PRESETS.glob("*.yaml")):
        found.append(Preset(path.stem, read_yaml(path).get("description", ""), path))
    return found


def load_config(preset: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset by name, or any YAML file by path, and apply `key.sub=value` overrides.

    `extends: NAME` in a file starts from another preset (or from the file at a path relative to it): mappings are
    merged, lists and values replace the other's, and so does a section of another `family` or `name`.

    Raises ConfigError when a key, a value or a combination is not allowed, before anything has started.
    """
    return load_noting(preset, overrides)[0]


def load_noting(preset: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As `load_config`, and a line for each override that set more than the key it names."""
    data, notes = _with_overrides(preset, overrides)
    try:
        return parse_config(data), notes
    except ConfigError as error:  # what is wrong may be what an override set besides its key
        raise ConfigError("\n".join([str(error), *notes])) from None


def check_override_keys(preset: str | Path, overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override of `preset` that names no setting; of values, only for what is no YAML."""
    check_keys(Config, _with_overrides(preset, overrides)[0])


def _with_overrides(preset: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    path = _preset_path(preset, Path())
    data = _read_preset(path)
    data.setdefault("name", path.stem)
    notes = apply_overrides(Config, data, overrides)
    _replace_length(data, {override.partition("=")[0] for override in overrides})
    return data, notes


def check_batch(config: Config, world_size: int) -> None:
    """Refuse a global batch that does not divide over the ranks, naming the nearest that does."""
    batch, accumulation = config.train.batch_size, config.train.grad_accum_steps
    share = world_size * accumulation
    if batch % share:
        below = batch // share * share
        near = f"{below} or {below + share}" if below else f"{share}"
        raise ConfigError(
            f"train.batch_size {batch} (global) does not divide over {world_size} ranks x {accumulation} "
            f"accumulation steps = {share}; the nearest batch sizes are {near}"
        )
    try:
        check_tokens(config, batch // share)
        spec_of(config.method).check_batch(config, batch // share)
        if config.encoder is not None:
            family_of(config.encoder).check_batch(config, batch // share)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_sources(config: Config) -> None:
    """Raise ConfigError unless the other runs that a method learns from are there and fit; starts nothing."""
    try:
        spec_of(config.method).call("sources", config)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from None


def parse_config(data: Mapping[str, Any]) -> Config:
    """Check a nested dictionary against the schema."""
    section = data.get("method")
    name = str(section.get("name")) if isinstance(section, Mapping) else ""
    if name in LEFT_OUT and name not in METHODS:
        raise ConfigError(f"method.name: {LEFT_OUT[name]}")
    check_keys(Config, data)
    try:
        return TypeAdapter(Config).validate_python(data)
    except ValidationError as error:
        raise ConfigError(explain(Config, error)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal Config, but for secrets in URLs."""
    return yaml.safe_dump(as_shown(config), sort_keys=False, width=110)


def as_shown(config: Config) -> dict[str, Any]:
    """The configuration as plain values, to be written down: passwords and tokens in URLs are hidden."""

    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shown(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shown(item) for item in value]
        return redact(value) if isinstance(value, str) else value

    return shown(TypeAdapter(Config).dump_python(config, mode="json"))


def differences(old: Config, new: Config) -> list[str]:
    """One line for every key whose value differs, as `key: old -> new`."""
    before, after = (dict(_leaves(as_shown(config))) for config in (old, new))
    keys = list(before) + [key for key in after if key not in before]
    absent = "(not set)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent)
    ]


def override_section(section: Any, overrides: Sequence[str]) -> Any:
    """One section, such as an encoder's, with `key=value` overrides applied and checked."""
    kind = type(section)
    data = TypeAdapter(kind).dump_python(section, mode="json")
    apply_overrides(kind, data, overrides)
    check_keys(kind, data)
    return TypeAdapter(kind).validate_python(data)


def _preset_path(preset: str | Path, folder: Path) -> Path:
    """The file of a preset by name, or by a path that starts in `folder`."""
    if Path(preset).suffix in {".yaml", ".yml"}:
        path = folder / preset
        if not path.is_file():
            raise ConfigError(f"there is no file {path}; `selfsight pretrain --list` shows the presets by name")
        return path
    path = PRESETS / f"{preset}.yaml"
    if not path.is_file():
        if preset in RENAMED_PRESETS:
            raise ConfigError(f"the preset {preset} is called {RENAMED_PRESETS[str(preset)]} now: write that instead")
        names = sorted(known.stem for known in PRESETS.glob("*.yaml"))
        near = difflib.get_close_matches(str(preset), names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"presets: {', '.join(names)}."
        raise ConfigError(f"there is no preset {str(preset)!r}; {hint} A file of your own is named by its path.yaml")
    return path


def _read_preset(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file holds, over what it extends; `below` are the files that extend this one."""
    if path.resolve() in below:
        chain = " -> ".join(file.name for file in (*below, path))
        raise ConfigError(f"{path} extends itself: {chain}; remove one `extends`")
    data = read_yaml(path, annotation=Config)
    if "encoder" in data:
        data["encoder"] = expand_encoder(data["encoder"])
    base = data.pop("extends", None)
    if base is None:
        return _merged({}, data)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}; name one preset, or one path.yaml")
    try:
        inherited = _read_preset(_preset_path(base, path.parent), (*below, path.resolve()))
    except ConfigError as error:
        raise error if below else ConfigError(f"{path} extends {base}: {error}") from None
    inherited.pop("name", None)  # the name of the run is the extending file's
    merged = _merged(inherited, data)
    train = data.get("train")
    _replace_length(merged, {f"train.{key}" for key in train} if isinstance(train, Mapping) else set())
    return merged


def _replace_length(data: dict[str, Any], given: Set[str]) -> None:
    """How long a run is, in epochs or in steps, takes the place of the other where only that one is `given`."""
    train = data.get("train")
    if not isinstance(train, dict):
        return
    for key, other in (("epochs", "steps"), ("steps", "epochs")):
        if f"train.{key}" in given and f"train.{other}" not in given and train.get(key) is not None:
            train.pop(other, None)


def _merged(base: Any, over: Any) -> Any:
    """`over` on top of `base`, made anew: what a YAML alias made one is set apart, so that an override changes one."""
    if isinstance(over, Mapping):
        other_section = isinstance(base, Mapping) and any(
            tag in base and tag in over and base[tag] != over[tag] for tag in ("family", "name")
        )
        merged = {} if other_section or not isinstance(base, Mapping) else dict(base)
        return merged | {key: _merged(merged.get(key), value) for key, value in over.items()}
    return [_merged(None, item) for item in over] if isinstance(over, list) else over


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        for position, item in enumerate(data):
            yield from _leaves(item, f"{path}.{position}")
    else:
        yield path, data
