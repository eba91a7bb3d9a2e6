"""Sweeps: the elements of a job array, each a run of its own (imports no torch)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.load import ConfigError

_OWN = ("name", "runs", "tracking.group")  # what makes elements runs of one sweep
_LONGEST_NAME = 120  # file systems allow 255, and a run's name becomes part of others


@dataclass(frozen=True)
class Element:
    """One run of a sweep: `SWEEP-optim.lr-0.001`, and what it changes."""

    name: str
    overrides: tuple[str, ...]


def sweep_elements(sweep: str, arrays: Sequence[str], file: Path | None, overrides: Sequence[str]) -> list[Element]:
    """The product of all `key=v1,v2,...`, times the elements that a YAML file lists.

    overrides: what is changed in all of them; a key may not be in both.
    Raises ConfigError for what is no list of values, for a key that is set twice, and for elements that are the same.
    """
    axes = [_axis(text) for text in arrays]
    if file is not None:
        axes.append(_listed(file))
    combined = [tuple(change for part in parts for change in part) for parts in product(*axes)]
    fixed = {override.partition("=")[0] for override in overrides}
    for changes in combined:
        keys = [change.partition("=")[0] for change in changes]
        for key in keys:
            if key in _OWN:
                raise ConfigError(f"{key} can't be swept: it is what makes the elements runs of one sweep")
            if key in fixed or keys.count(key) > 1:
                raise ConfigError(f"{key} is set twice, and swept; name it once")
    same = {changes for changes in combined if combined.count(changes) > 1}
    if same:
        raise ConfigError(f"the sweep has an element twice: {' '.join(min(same))}; leave one out")
    return list(_named(sweep, combined))


def _axis(text: str) -> list[tuple[str, ...]]:
    key, equals, values = text.partition("=")
    parts = _split(values)
    if not equals or not key or not all(part.strip() for part in parts):
        raise ConfigError(f"--array {text!r} is no list of values; write key=v1,v2,v3, such as optim.lr=1e-3,5e-4")
    return [(f"{key}={part.strip()}",) for part in parts]


def _split(text: str) -> list[str]:
    """Split at commas that are in no brackets and no quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _listed(file: Path) -> list[tuple[str, ...]]:
    """The elements of a YAML file: a list of mappings from keys to values."""
    try:
        items = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) and item for item in items):
        raise ConfigError(f"{file} is no list of elements; write one a line, such as `- {{optim.lr: 1e-3, seed: 1}}`")
    return [tuple(f"{key}={_text(value)}" for key, value in item.items()) for item in items]


def _text(value: Any) -> str:
    """A YAML value as an override's text, which is read as YAML again."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)


def _named(sweep: str, combined: Sequence[tuple[str, ...]]) -> Iterator[Element]:
    keys = {change.partition("=")[0] for changes in combined for change in changes}
    last = [key.rpartition(".")[2] for key in keys]
    names: set[str] = set()
    for number, changes in enumerate(combined):
        parts = [sweep]
        for change in changes:
            key, _, value = change.partition("=")
            short = key.rpartition(".")[2]
            parts.append(f"{short if last.count(short) == 1 else key}-{value}")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-")
        if len(name) > _LONGEST_NAME or name in names:
            name = f"{name[:_LONGEST_NAME]}-{number}"
        names.add(name)
        yield Element(name, changes)
