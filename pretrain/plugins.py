"""What installed distributions add to ours by entry points (imports no torch)."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import entry_points
from typing import TypeVar

T = TypeVar("T")


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
