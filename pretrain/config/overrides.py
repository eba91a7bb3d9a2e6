"""`key.sub=value` on the command line, applied to a configuration that has been read but not yet checked."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pretrain.config.annotations import (
    element_of,
    hints_of,
    sections_of,
    settings_at,
    tag_of,
    takes_only_text,
)
from pretrain.config.errors import ConfigError
from pretrain.config.yaml_file import parse_yaml
from pretrain.encoders.registry import expand_encoder

#: Keys of the command line that stand for several, and what they set.
SHORTCUTS = {
    "image_size": "height and width in px of what the encoder sees: of every global crop, and of the target crop in "
    "proportion",
    "crop_size": "the same as image_size",
}
#: Settings of one kind of encoder that mean the same for every other.
_SHARED = ("size", "drop_path")


def apply_overrides(root: type, data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Change `data`, a section of type `root` as it was read; a line for each override that sets more than its key.

    Another encoder or method comes first, then the shortcuts, then what is set by its own name, in the given order.
    Raises ConfigError for what is no override, or can't be reached.
    """
    pairs = [_parsed(root, override) for override in overrides]
    stage = {key: 0 if _kinds_at(root, key) else 1 if key in SHORTCUTS else 2 for key, _, _ in pairs}
    notes: list[str] = []
    for key, value, override in sorted(pairs, key=lambda pair: stage[pair[0]]):
        if stage[key] == 0 and isinstance(value, str):
            notes += _change_kind(root, data, key, value)
        elif stage[key] == 1 and _has(root, "views"):
            notes += _set_image_size(data, value, override)
        else:
            notes += _set(data, key.split("."), value, override)
    return notes


def _has(root: type, key: str) -> bool:
    return key in hints_of(root)


def _parsed(root: type, override: str) -> tuple[str, Any, str]:
    """Key, value and text of an override."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        shards = f", or --data {override} for shards" if "/" in override or Path(override).exists() else ""
        raise ConfigError(f"{override!r} is not an override; write key.sub=value, such as train.epochs=100{shards}")
    annotations = [setting.annotation for setting in settings_at(root, key)]
    if annotations and all(map(takes_only_text, annotations)) and not _is_yaml(text, annotations):
        return key, text, override
    try:
        value = parse_yaml(text, annotations)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not YAML: {error}") from None
    return key, expand_encoder(value) if key == "encoder" else value, override


def _is_yaml(text: str, annotations: Sequence[Any]) -> bool:
    """Whether what is given for a text is none: null, in quotes, or a list where the setting takes one, too."""
    if text.strip() in ("", "null", "~"):
        return True
    listed = text.lstrip().startswith("[") and any(element_of(annotation) is not None for annotation in annotations)
    return listed or (text.strip()[0] in "'\"" and text.strip()[0] == text.strip()[-1])


def _set(node: Any, parts: Sequence[str], value: Any, override: str, path: str = "") -> list[str]:
    """Put `value` where `parts` lead; into every item of a list of sections where they name none."""
    part, *rest = parts
    here = f"{path}.{part}".lstrip(".")
    if isinstance(node, list):
        if not part.isdigit() and node and all(isinstance(item, dict) for item in node):
            for item in node:
                _set(item, parts, copy.deepcopy(value), override, path)
            many = "the only one" if len(node) == 1 else f"all {len(node)}"
            return [f"{override} sets that of {many} of {path}; of one alone: {path}.0.{'.'.join(parts)}=..."]
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(f"{override.partition('=')[0]}: {part!r} should be a position from 0 to {len(node) - 1}")
        if not rest:
            node[int(part)] = value
            return []
        below = node[int(part)]
    else:
        if not rest:
            node[part] = value
            return []
        if node.get(part) is None:
            node[part] = {}
        below = node[part]
    if not isinstance(below, (dict, list)):
        raise ConfigError(f"{here} is {below!r}, a value without keys; {override!r} can't be set")
    return _set(below, rest, value, override, here)


def _kinds_at(root: type, key: str) -> list[type]:
    """The kinds of a section that `encoder.family`, or `encoder` alone, chooses between; none for other keys."""
    section, _, tag = key.partition(".")
    if not _has(root, section):
        return []
    kinds = [kind for kind in sections_of(hints_of(root)[section]) if tag_of(kind)]
    tags = {found[0] for kind in kinds if (found := tag_of(kind))}
    return kinds if len(kinds) > 1 and (not tag or tag in tags) else []


def _change_kind(root: type, data: dict[str, Any], key: str, value: str) -> list[str]:
    """Make a section one of another kind, keeping of it what means the same there; a line on what went."""
    section = key.partition(".")[0]
    kinds = {found[1]: kind for kind in _kinds_at(root, key) if (found := tag_of(kind))}
    tag = next(found[0] for kind in kinds.values() if (found := tag_of(kind)))
    old = data.get(section)
    before = kinds.get(old.get(tag)) if isinstance(old, Mapping) else None
    after = kinds.get(value)
    if not isinstance(old, Mapping) or before is None or after is None or before is after:
        if isinstance(old, dict) and after is not None:
            old[tag] = value
        else:
            data[section] = {tag: value}  # of an unknown kind, the check says which there are
        return []
    kept = {name: old[name] for name in old if name != tag and _means_the_same(name, before, after, old[name])}
    data[section] = {tag: value, **kept}
    defaults = {field.name: field.default for field in before.__dataclass_fields__.values()}
    gone = {n: old[n] for n in old if n not in {tag, *kept} and not _equal(before, n, old[n], defaults.get(n))}
    lines = [f"{section}.{tag} is {value} instead of {old[tag]}"]
    if gone:
        lines.append("these settings of the preset went with it: " + _listed(gone))
    if kept:
        lines.append("kept: " + _listed(kept))
    return [f"{'; '.join(lines)} (`selfsight settings {section} --of {value}` shows what it has)"]


def _means_the_same(name: str, before: type, after: type, value: Any) -> bool:
    """Whether a setting of one kind is one of the other: inherited by both from one class, or meant alike by all."""
    if name not in hints_of(after):
        return False
    common = [base for base in before.__mro__ if base in after.__mro__ and name in inspect.get_annotations(base)]
    is_section = bool(sections_of(hints_of(after)[name])) and hints_of(after)[name] == hints_of(before)[name]
    if not (common or is_section or name in _SHARED):
        return False
    try:
        TypeAdapter(hints_of(after)[name]).validate_python(value)
    except ValidationError:
        return False
    return True


def _equal(section: type, name: str, value: Any, default: Any) -> bool:
    """Whether a value, as it stands in a file, is the default."""
    adapter = TypeAdapter(hints_of(section)[name]) if name in hints_of(section) else None
    try:
        return adapter is not None and bool(adapter.validate_python(value) == default)
    except ValidationError:
        return False


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={written(value)}" for name, value in values.items())


def written(value: Any) -> str:
    """A value as it is written on the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("...\n").strip()


def _set_image_size(data: dict[str, Any], value: Any, override: str) -> list[str]:
    """Every global crop's size, and in proportion those that show the same; a line on what was set and what stays."""
    views = data.get("views")
    crops = views.get("global_crops") if isinstance(views, dict) else None
    if not isinstance(crops, list) or not all(isinstance(crop, dict) for crop in crops):
        raise ConfigError(f"{override!r} sets views.global_crops, and there are none; name a preset that has them")
    size = _pair(value)
    if size is None:
        raise ConfigError(f"{override!r}: a size is a whole number of px, or [height, width]")
    assert isinstance(views, dict)
    set_, stays = [], []
    for name in ("target_crop", "teacher_crops"):
        follows = views.get(name)
        if not isinstance(follows, dict) or not crops:
            continue
        old, scaled = _pair(crops[0].get("size")), _pair(follows.get("size"))
        if old and scaled:
            new = [scaled[axis] * size[axis] / old[axis] for axis in (0, 1)]
            if all(side.is_integer() for side in new):
                follows["size"] = [int(side) for side in new] if new[0] != new[1] else int(new[0])
                set_.append(f"views.{name}.size={written(follows['size'])}")
            else:
                stays.append(f"views.{name}.size={written(follows['size'])}")
    for crop in crops:
        crop["size"] = value
    set_.insert(0, f"views.global_crops.size={written(value)}")
    local = views.get("local_crops")
    if isinstance(local, dict) and "size" in local:
        stays.append(f"views.local_crops.size={written(local['size'])}")
    also = f"; as it was: {', '.join(stays)}" if stays else ""
    return [f"{override} sets {' and '.join(set_)}{also}"]


def _pair(value: Any) -> tuple[int, int] | None:
    """Height and width, of a number or of two."""
    sides = [value, value] if isinstance(value, int) else value
    whole = isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    return (sides[0], sides[1]) if whole else None
