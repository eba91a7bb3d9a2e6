"""What the type of a setting says: its sections, which of them is meant, and whether it takes only text."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

#: The key of a section that says which of several kinds it is: `encoder.family`, `method.name`.
TAGS = ("family", "name")


class Setting(NamedTuple):
    """One key of a configuration: `path` with dots, without positions in lists; `owner` is the section it stands in."""

    path: str
    owner: type
    annotation: Any
    kind: str | None = None  # of several kinds of the section, the one that has it: `dino`
    within: Any = None  # the section as it is by default, which may have other values than the class: MIM's mask

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def default(self) -> Any:
        """What it is where nothing sets it; dataclasses.MISSING where something has to."""
        if self.within is not None:
            return getattr(self.within, self.name)
        field = next(field for field in dataclasses.fields(self.owner) if field.name == self.name)
        value: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        if isinstance(value, FieldInfo):
            value = value.get_default(call_default_factory=True)
        return dataclasses.MISSING if value is PydanticUndefined else value

    @property
    def default_section(self) -> Any:
        return self.default if dataclasses.is_dataclass(self.default) else None


def members(annotation: Any) -> list[Any]:
    """The types that a union is made of; one type by itself."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for member in get_args(annotation) for found in members(member)]
    return [annotation]


def element_of(annotation: Any) -> Any:
    """The type of a list's items, None where the setting takes no list."""
    sequence = next((member for member in members(annotation) if get_origin(member) in (tuple, list)), None)
    return next((arg for arg in get_args(sequence) if arg is not Ellipsis), None)


def sections_of(annotation: Any) -> list[type]:
    """The sections that a setting, or each item of its list, may be."""
    found = [member for member in members(annotation) if dataclasses.is_dataclass(member)]
    element = element_of(annotation)
    return found or ([] if element is None else sections_of(element))


@cache
def hints_of(section: type) -> dict[str, Any]:
    """The annotation of every key of a section."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def tag_of(section: type) -> tuple[str, str] | None:
    """(`family`, `vit`) of a section that is one of several kinds."""
    for tag in TAGS:
        hint = hints_of(section).get(tag)
        if get_origin(hint) is Literal:
            return tag, get_args(hint)[0]
    return None


def section_of(annotation: Any, data: Any) -> type | None:
    """The section that `data` is meant for; of several kinds, the one whose `family` or `name` is given."""
    sections = [member for member in members(annotation) if dataclasses.is_dataclass(member)]
    if not sections or not isinstance(data, Mapping):
        return None
    if len(sections) == 1:
        return sections[0]
    tags = {section: tag_of(section) for section in sections}
    return next((section for section, tag in tags.items() if tag and data.get(tag[0]) == tag[1]), None)


def all_settings(section: type, path: str = "", kind: str | None = None, within: Any = None) -> Iterator[Setting]:
    """Every key below `section`, those of all kinds of encoders and methods among them."""
    for name, hint in hints_of(section).items():
        setting = Setting(f"{path}{name}", section, hint, kind, within)
        yield setting
        for member, its_kind in _kinds(setting):
            yield from all_settings(member, f"{path}{name}.", its_kind, setting.default_section)


def settings_at(root: type, key: str) -> list[Setting]:
    """What `key` names, with or without positions in lists: one setting, or one of each kind that has it."""
    *above, last = [part for part in key.split(".") if not part.isdigit()] or [""]
    places: list[tuple[type, str | None, Any]] = [(root, None, None)]
    for depth, name in enumerate(above):
        path = ".".join(above[: depth + 1])
        holding = [
            Setting(path, place, hints_of(place)[name], *about) for place, *about in places if name in hints_of(place)
        ]
        places = [(member, kind, setting.default_section) for setting in holding for member, kind in _kinds(setting)]
    return _having(places, ".".join([*above, last]))


def _having(places: Sequence[tuple[type, str | None, Any]], path: str) -> list[Setting]:
    """The setting at `path` of those sections that have it."""
    name = path.rpartition(".")[2]
    return [Setting(path, place, hints_of(place)[name], *about) for place, *about in places if name in hints_of(place)]


def _kinds(setting: Setting) -> list[tuple[type, str | None]]:
    """The sections that a setting may be, each with the name of its kind, where there are several."""
    sections = sections_of(setting.annotation)
    tags = [tag_of(section) if len(sections) > 1 else None for section in sections]
    return [(section, tag[1] if tag else setting.kind) for section, tag in zip(sections, tags, strict=True)]


def takes_only_text(annotation: Any) -> bool:
    """Whether a plain value of this setting is text, whatever it looks like: `2024`, `on`, `1e3`."""
    plain = [
        member
        for member in members(annotation)
        if member is not type(None) and not dataclasses.is_dataclass(member) and get_origin(member) not in (tuple, list)
    ]
    return bool(plain) and all(_is_text(member) for member in plain)


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return annotation is str
