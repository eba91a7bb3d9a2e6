"""The kinds there are of a thing: a folder of ours each, and what installed distributions add (imports no torch)."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


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
    wrong while it is loaded is that plug-in's trouble alone: it is left out, and nothing is raised.
    """
    found: dict[str, T] = {}
    broken: dict[str, str] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        of = f"{group} {point.name!r} of {point.dist.name if point.dist else point.value}"
        try:
            if point.name in taken or point.name in found:
                raise ValueError("the name is already taken; its authors must choose another")
            spec = point.load()
            if not isinstance(spec, kind) or getattr(spec, "name", None) != point.name:
                raise ValueError(f"{point.value} is no {kind.__name__} of the name {point.name!r}")
        except (Exception, SystemExit) as error:  # of someone else's code: anything may be raised
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            broken.setdefault(point.name, f"{of} is left out: {reason}")
        else:
            found[point.name] = spec
    return found, {name: line for name, line in broken.items() if name not in found}
