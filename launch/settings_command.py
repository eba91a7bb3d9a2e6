"""`selfsight settings`: what can be set, what it means, what it takes; read from the configuration's own sections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

SETTINGS_EXAMPLES = (
    "Examples:\n\n[bold]selfsight settings[/]\n\n[bold]selfsight settings optim[/]\n\n"
    "[bold]selfsight settings optim.lr[/]\n\n[bold]selfsight settings method --of dino[/]\n\n"
    "[bold]selfsight settings temperature[/]"
)


def settings(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A section, a setting, or a word to look for.")
    ] = None,
    of: Annotated[
        str | None, typer.Option(metavar="KIND", help="Of several kinds, this one: a method, a family of encoders.")
    ] = None,
) -> None:
    """Show what can be set as KEY=VALUE: meaning, default, allowed values, an example."""
    from pretrain.config import Config
    from pretrain.config.annotations import all_settings, sections_of, settings_at
    from pretrain.config.describe import example_of, first_sentence, is_section, meaning
    from pretrain.config.errors import ConfigError
    from pretrain.config.keys import known
    from pretrain.config.overrides import SHORTCUTS

    every = list(all_settings(Config))
    if key is None and of is not None:  # the section that has it
        key = next((s.path.partition(".")[0] for s in every if s.kind == of), None)
        if key is None:
            raise ConfigError(
                f"there is no kind {of!r}; there are {', '.join(sorted({s.kind for s in every if s.kind}))}"
            )
    if key is None:
        for setting in every:
            if "." not in setting.path:
                below = len({other.path for other in every if other.path.startswith(f"{setting.path}.")})
                _line(setting.path, f"{meaning(setting)}{f' ({below} settings)' if below else ''}")
        for name, text in SHORTCUTS.items():
            _line(name, f"short for several: {text}")
        typer.echo("\n`selfsight settings SECTION` shows a section, `selfsight settings WORD` looks for a word")
        return
    key = key.partition("=")[0].strip(".")
    if key in SHORTCUTS:
        typer.echo(f"{key}=64 is short for {SHORTCUTS[key]}")
        return
    found = settings_at(Config, key)
    if not found:
        words = key.lower().split()
        hits = [s for s in every if all(word in f"{s.path} {meaning(s)}".lower() for word in words)]
        if not hits:
            known(Config, key)  # says which are near
        chosen = [hit for hit in hits if of in (None, hit.kind)]
        if hits and not chosen:
            raise ConfigError(f"no setting of {of} has to do with {key!r}; others do: leave out --of {of}")
        _table(chosen)
        return
    if (len(found) == 1 and is_section(found[0])) or of is not None:
        kinds = {setting.kind for setting in every if setting.path.startswith(f"{key}.") and setting.kind}
        kinds |= {setting.kind for setting in found if setting.kind}
        if of is not None and of not in kinds:
            there = f"there are {', '.join(sorted(kinds))}" if kinds else "it has one kind only"
            raise ConfigError(f"{key} has no kind {of!r}; {there}")
    chosen = [setting for setting in found if of in (None, setting.kind) or is_section(setting)]
    if not is_section(chosen[0]):
        _details(chosen)
        return
    typer.echo(f"{key}: {meaning(chosen[0])}\n")
    sections = list(dict.fromkeys(section for setting in chosen for section in sections_of(setting.annotation)))
    inside = [s for s in every if s.path.startswith(f"{key}.") and of in (None, s.kind)]
    if example_of(chosen[0]) != "...":  # a plain value will do as well
        _details(chosen[:1])
    if len(sections) > 1 and of is None:
        typer.echo(f"It is one of {len(sections)} kinds; `selfsight settings {key} --of KIND` shows one:")
        for setting in inside:
            if setting.path.count(".") == key.count(".") + 1 and setting.name in ("name", "family"):
                _line(str(setting.kind), first_sentence(setting.owner))
        return
    _table(inside)


def _line(name: str, text: str) -> None:
    typer.echo(f"{name:<20} {text}")


def _table(found: Sequence[object]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pretrain.config.annotations import Setting
    from pretrain.config.describe import default_of, is_section, meaning, takes

    table = Table("setting", "default", "takes", "meaning", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for setting in found:
        assert isinstance(setting, Setting)
        inner = is_section(setting)
        default = "" if inner else default_of(setting)
        about = f"{setting.path} ({setting.kind})" if setting.kind and len(_kinds(found)) > 1 else setting.path
        table.add_row(about, "-" if default is None else default, takes(setting.annotation), meaning(setting))
    Console(highlight=False).print(table, markup=False)


def _kinds(found: Iterable[object]) -> set[object]:
    return {getattr(setting, "kind", None) for setting in found}


def _details(found: Sequence[object]) -> None:
    """One setting, or what it is in each kind that has it; those alike are told once."""
    from pretrain.config.annotations import Setting
    from pretrain.config.describe import default_of, example_of, meaning, takes

    told: dict[tuple[str, ...], list[str]] = {}
    for setting in found:
        assert isinstance(setting, Setting)
        default = default_of(setting)
        entry = (
            meaning(setting),
            f"takes    {takes(setting.annotation)}",
            f"default  {'none: it has to be set' if default is None else default}",
            f"example  {setting.path}={example_of(setting)}",
        )
        told.setdefault(entry, []).append(setting.kind or "")
        path = setting.path
    for lines, kinds in told.items():
        typer.echo(path + (f" (of {', '.join(kinds)})" if any(kinds) else ""))
        typer.echo("\n".join(f"  {line}" for line in lines if line))
