"""The kinds there are of a thing: a folder of ours each, and what installed distributions add (imports no torch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import TypeAdapter


class Spec(Protocol):
    """What every kind of thing says of itself."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> type: ...


T = TypeVar("T", bound=Spec)


def registered(package: str, group: str, kind: type[T]) -> tuple[dict[str, T], dict[str, str]]:
    """All specs by name, `SPEC` of each `package.NAME.config` first, and of plug-ins that can't be used, why."""
    home = Path(str(import_module(package).__file__)).parent
    names = sorted(path.parent.name for path in home.glob("*/config.py"))
    own = {name: import_module(f"{package}.{name}.config").SPEC for name in names}
    added, left_out = load_plugins(group, kind, own)
    return own | added, left_out


def load_plugins(group: str, kind: type[T], taken: Collection[str]) -> tuple[dict[str, T], dict[str, str]]:
    """The specs that the entry points of `group` name, and a line for each that is left out, both by name.

    An entry point `NAME = "package.module:SPEC"` names an object of type `kind` whose `name` is NAME. Whatever goes
    wrong while it is loaded is that plug-in's trouble alone: it is left out, and nothing is raised. Of two of one name
    both are left out, for which comes first would differ between machines.
    """
    found: dict[str, T] = {}
    broken: dict[str, str] = {}
    points = sorted(entry_points(group=group), key=lambda point: point.name)
    times = Counter(point.name for point in points)
    for point in points:
        of = f"{group} {point.name!r} of {point.dist.name if point.dist else point.value}"
        try:
            if point.name in taken:
                raise ValueError("the name is already taken; its authors must choose another")
            if times[point.name] > 1:
                raise ValueError("another distribution has one of this name; uninstall all but one of them")
            spec = point.load()
            if not isinstance(spec, kind) or getattr(spec, "name", None) != point.name:
                raise ValueError(f"{point.value} is no {kind.__name__} of the name {point.name!r}")
            TypeAdapter(spec.config)  # a section of which pydantic can't make a schema would end every command
        except (Exception, SystemExit) as error:  # of someone else's code: anything may be raised
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            broken.setdefault(point.name, f"{of} is left out: {reason}")
        else:
            found[point.name] = spec
    return found, broken
