"""From a preset and `key.sub=value` overrides to a checked `Config`, and back to YAML (imports no torch)."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from data_pipelines.remote.urls import redact
from pretrain.config import Config
from pretrain.config.encoders import expand_encoder
from pretrain.methods.registry import LEFT_OUT, spec_of

PRESETS = Path(__file__).parents[1] / "presets"
MOST_VALUES = 100_000  # of one file
#: What pydantic calls the branches of a union of plain types.
_PLAIN_TYPES = {"int", "float", "constrained-int", "constrained-float"}


class ConfigError(ValueError):
    """A configuration that can't be run; the message names the key, the value, what is allowed."""


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
    path = _preset_path(preset, Path())
    data = _read_preset(path)
    data.setdefault("name", path.stem)
    for override in overrides:
        _apply(data, override)
    _replace_length(data, {override.partition("=")[0] for override in overrides})
    return parse_config(data)


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
        spec_of(config.method).check_batch(config, batch // share)
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
    named = data.get("method")
    if isinstance(named, Mapping) and str(named.get("name")) in LEFT_OUT:
        raise ConfigError(f"method.name: {LEFT_OUT[str(named['name'])]}")
    _check_keys(Config, data, "")
    try:
        return TypeAdapter(Config).validate_python(data)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


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
    for override in overrides:
        _apply(data, override)
    _check_keys(kind, data, "")
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
        names = [known.name for known in list_presets()]
        near = difflib.get_close_matches(str(preset), names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"presets: {', '.join(names)}."
        raise ConfigError(f"there is no preset {str(preset)!r}; {hint} A file of your own is named by its path.yaml")
    return path


def _read_preset(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file holds, over what it extends; `below` are the files that extend this one."""
    if path.resolve() in below:
        chain = " -> ".join(file.name for file in (*below, path))
        raise ConfigError(f"{path} extends itself: {chain}; remove one `extends`")
    data = read_yaml(path)
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


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key written twice, which YAML would let the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(f"{mark.name}: {key!r} is set twice, again in line {mark.line + 1}")
            seen.add(key)
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, may_be_empty: bool = False) -> dict[str, Any]:
    """The mapping that a YAML file holds; ConfigError for anything else, and for a key that is there twice."""
    try:
        with path.open(encoding="utf-8") as file:
            loader = _Loader(file)
            try:
                data = loader.get_single_data()
            finally:
                loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if data is None and may_be_empty:  # a file of comments
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}; a configuration is a mapping of sections")
    _count_values(data, path, {})
    return data


def _count_values(node: Any, path: Path, counts: dict[int, int | None]) -> int:
    """Values of a file with each alias counted where it stands, which a few lines can make billions of."""
    if not isinstance(node, (dict, list)):
        return 1
    known = counts.get(id(node), 0)
    if known is None:
        raise ConfigError(f"{path} holds a YAML alias that contains itself")
    if not known:
        counts[id(node)] = None
        items = node.values() if isinstance(node, dict) else node
        known = 1 + sum(_count_values(item, path, counts) for item in items)
        if known > MOST_VALUES:
            raise ConfigError(f"{path} holds more than {MOST_VALUES:,} values, its YAML aliases written out")
        counts[id(node)] = known
    return known


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        shards = f", or --data {override} for shards" if "/" in override or Path(override).exists() else ""
        raise ConfigError(f"{override!r} is not an override; write key.sub=value, such as train.epochs=100{shards}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not YAML: {error}") from None
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_position(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise ConfigError(
                f"{'.'.join(parents[: depth + 1])} is {node!r}, a value without keys; {override!r} can't be set"
            )
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = expand_encoder(value) if key == "encoder" else value


def _position(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{key}: {part!r} should be a position from 0 to {len(items) - 1}")
    return int(part)


def _check_keys(annotation: Any, data: Any, path: str) -> None:
    """Refuse unknown keys, naming the nearest right one with its full path."""
    section = _section_of(annotation, data)
    if section is None:
        if isinstance(data, (list, tuple)):
            sequence = next((member for member in _members(annotation) if get_origin(member) in (tuple, list)), None)
            element = next((arg for arg in get_args(sequence) if arg is not Ellipsis), None)
            for position, item in enumerate(data):
                _check_keys(element, item, f"{path}{position}.")
        return
    hints = get_type_hints(section, include_extras=True)
    for key, value in data.items():
        if key not in hints:
            full = f"{path}{key}"
            known = [f"{path}{name}" for name in hints] + [name for name in _all_keys(Config, "") if name != full]
            near = _nearest(str(key), full, known)
            here = ", ".join(sorted(hints))
            raise ConfigError(f"unknown key {full}; " + (f"did you mean {near}?" if near else f"allowed here: {here}"))
        _check_keys(hints[key], value, f"{path}{key}.")


def _nearest(key: str, full: str, known: list[str]) -> str | None:
    """The known full path most like `full`, or the one whose last part is most like `key`."""
    here = [name for name in known if name.rpartition(".")[0] == full.rpartition(".")[0]]
    for names in (here, known):
        last = {name.rpartition(".")[2]: name for name in reversed(names)}
        near = difflib.get_close_matches(str(key), list(last), n=1, cutoff=0.7)
        if near:
            return last[near[0]]
    near = difflib.get_close_matches(full, known, n=1, cutoff=0.7)
    return near[0] if near else None


def _all_keys(section: type, path: str) -> Iterator[str]:
    for name, hint in get_type_hints(section, include_extras=True).items():
        yield f"{path}{name}"
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                yield from _all_keys(member, f"{path}{name}.")


def _bare(annotation: Any) -> Any:
    """`annotation` without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    members = [member for member in _members(annotation) if member is not type(None)]
    return _bare(members[0]) if len(members) == 1 and members[0] is not annotation else annotation


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for member in get_args(annotation) for found in _members(member)]
    return [annotation]


def _section_of(annotation: Any, data: Any) -> type | None:
    """The dataclass that `data` is meant for; of several, the one whose `family` or `name` is given."""
    sections = [member for member in _members(annotation) if dataclasses.is_dataclass(member)]
    if not sections or not isinstance(data, Mapping):
        return None
    if len(sections) == 1:
        return sections[0]
    for section in sections:
        for tag in ("family", "name"):
            if tag in data and data[tag] == getattr(section, tag, None):
                return section
    return None


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        # a union's branch (its tag or type) is part of pydantic's location, not of the key
        parts = [str(part) for part in item["loc"]]
        if parts[:2] == ["data", "train"]:
            one_path = parts[2:] == ["str"]
            if isinstance(item["input"], list) if one_path else parts[3:] == []:
                continue  # of one path and of a list, only what was meant
            del parts[2:3]
        parts = [part for i, part in enumerate(parts) if not (i and parts[i - 1] in {"encoder", "method"} and i == 1)]
        if len(parts) > 1 and (parts[-1] in _PLAIN_TYPES or parts[-1].startswith("literal[")):
            del parts[-1]
        key = ".".join(parts)
        message = item["msg"].removeprefix("Value error, ")
        given = (
            ""
            if isinstance(item["input"], Mapping) or item["type"] == "value_error"
            else f" (given: {item['input']!r})"
        )
        if key == "data.train" and item["input"] is None:
            message, given = "no training shards are named", "; add --data PATH (short for data.train=PATH)"
        elif item["type"] == "missing":
            given = f"; set it with {key}=..."
        if lines and key and lines[-1].startswith(f"{key}: "):  # the value may have another type, too
            if item["type"] == "literal_error":
                also = message.removeprefix("Input should be ")
                lines[-1] = f"{lines[-1].removesuffix(given)}, or {also}{given}"
                continue
            del lines[-1]  # integers, then numbers: these take more
        lines.append(f"{key}: {message}{given}" if key else f"{message}{given}")
    return "\n".join(lines)


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        for position, item in enumerate(data):
            yield from _leaves(item, f"{path}.{position}")
    else:
        yield path, data
