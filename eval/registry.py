"""Which probes there are: the files of `eval/probes`, and what installed distributions add (imports no torch).

A distribution adds one by an entry point of the group `selfsight.probes` that leads to its `ProbeSpec`; README.md has
an example.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

import eval.probes
from eval.base import LabelKind, ProbeSpec

GROUP = "selfsight.probes"
_RESERVED = {"headline", "dim", "num_train", "num_val"}  # they stand beside the probes' results


def built_in() -> tuple[str, ...]:
    """Names of the probes of this package, without importing any."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(eval.probes.__path__)))


@cache
def plug_ins() -> dict[str, tuple[EntryPoint, ...]]:
    """What other distributions register, by name, without importing any."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def names() -> tuple[str, ...]:
    """Of every probe there is: those of this package, then those of others that no name is taken from."""
    return (*built_in(), *sorted(name for name, entries in plug_ins().items() if _refusal(name, entries) is None))


def problems() -> list[str]:
    """A line for each name of other distributions that is refused."""
    lines = (_refusal(name, entries) for name, entries in sorted(plug_ins().items()))
    return [line for line in lines if line is not None]


def origin(name: str) -> str | None:
    """The distribution and version that a probe comes from; None for one of this package."""
    return None if name in built_in() else _origin(plug_ins()[name][0])


def check_names(wanted: Iterable[str]) -> None:
    """Raise ValueError for a probe that is not there or refused; imports none."""
    for name in wanted:
        if name in built_in():
            continue
        entries = plug_ins().get(name, ())
        if not entries:
            raise ValueError(f"there is no probe {name!r}; there are {', '.join(names())}")
        if (refusal := _refusal(name, entries)) is not None:
            raise ValueError(refusal)


def load(name: str) -> ProbeSpec:
    """The probe of that name, which is imported only now.

    Raises ValueError for a name that is not there or refused, and for a plug-in that does not import or is no probe.
    """
    if name in built_in():
        spec = import_module(f"eval.probes.{name}").SPEC
        assert isinstance(spec, ProbeSpec)
        assert spec.name == name, f"eval/probes/{name}.py names its probe {spec.name}"
        return spec
    check_names([name])
    entries = plug_ins()[name]
    try:
        spec = entries[0].load()
    except Exception as error:  # whatever another's module does when it is imported
        raise ValueError(f"the probe {name} of {_origin(entries[0])} can't be imported: {error!r}") from error
    if not isinstance(spec, ProbeSpec) or spec.name != name:
        what = f"a ProbeSpec named {spec.name!r}" if isinstance(spec, ProbeSpec) else repr(spec)[:80]
        raise ValueError(f"{entries[0].value} of {_origin(entries[0])} is {what}, not a ProbeSpec named {name!r}")
    return spec


def chosen(also: Iterable[str] = (), only: Iterable[str] = (), kind: LabelKind = "class") -> list[ProbeSpec]:
    """The probes that always run on labels of that kind, then those of `also`; or those of `only` and no others.

    ValueError as of `load`, and for one that is named and does not take such labels.
    """
    named = list(dict.fromkeys([*only, *also]))
    wanted = [spec for spec in map(load, named) if only or not (spec.always and spec.takes(kind))]
    for spec in wanted:
        if not spec.takes(kind):
            able = [name for name in names() if name not in plug_ins() and load(name).takes(kind)]
            kinds = spec.labels if isinstance(spec.labels, str) else " or ".join(spec.labels)
            raise ValueError(
                f"the probe {spec.name} is of labels of kind {kinds}, and these are of kind {kind}; "
                f"for them there are {', '.join(able)}"
            )
    always = [] if only else [spec for spec in map(load, built_in()) if spec.always and spec.takes(kind)]
    return always + wanted


def cheap(kind: LabelKind) -> list[str]:
    """Names of this package's probes that take such labels and cost seconds where features are kept."""
    specs = sorted(map(load, built_in()), key=lambda spec: not spec.always)  # what runs anyhow stands first
    return [
        spec.name
        for spec in specs
        if spec.needs == "pooled" and not spec.costly and spec.labels not in ("mask", "depth") and spec.takes(kind)
    ]


def _refusal(name: str, entries: tuple[EntryPoint, ...]) -> str | None:
    whose = ", ".join(_origin(entry) for entry in entries)
    if name in built_in():
        return f"{whose} registers a probe {name}, but that name is taken by Selfsight's own; it is left out"
    if len(entries) > 1:
        return f"{whose} register a probe {name} each; uninstall all but one of them"
    if not name.isidentifier() or name in _RESERVED:
        return f"{whose} registers a probe {name!r}, which can't be its name: give it letters and underscores"
    return None


def _origin(entry: EntryPoint) -> str:
    return "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
