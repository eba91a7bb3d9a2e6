"""`dataset.json` beside shards: what `selfsight pack` says of them. It may be a stranger's: its types are checked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data_pipelines.files import read_json

DESCRIPTION = "dataset.json"


def read_description(folder: Path) -> dict[str, Any] | None:
    """What `dataset.json` in a folder says; None where there is none. Raises as `check_description` does."""
    content = read_json(folder / DESCRIPTION)
    return None if content is None else check_description(content, str(folder / DESCRIPTION))


def check_description(content: Any, place: str) -> dict[str, Any]:
    """The content, of which whatever is read elsewhere has the type that `pack` gives it.

    Raises ValueError, which names `place` and the value.
    """
    problem = _problem(content)
    if problem is not None:
        raise ValueError(
            f"{place} is no description of a data set as `selfsight pack` writes it: {problem}; pack the data again, "
            "or remove the file"
        )
    return content


def _problem(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"it holds {_told(content)}"
    for name in ("mean", "std"):
        values = content.get(name)
        if values is not None and not (isinstance(values, list) and values and all(map(_is_number, values))):
            return f"{name} is {_told(values)}, not a list of numbers"
    if len(content.get("mean") or ()) != len(content.get("std") or ()):
        return "mean and std are of different lengths"
    classes = content.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return f"classes is {_told(classes)}, not a list of names"
    names = content.get("mask_names")
    if names is not None and not (
        isinstance(names, dict) and all(level.isdecimal() and isinstance(name, str) for level, name in names.items())
    ):
        return f"mask_names is {_told(names)}, not names by level"
    groups = content.get("groups")
    if groups is not None and not (isinstance(groups, dict) and isinstance(groups.get("key"), str)):
        return f"groups is {_told(groups)}, without a key"
    splits = content.get("splits", {})
    if not isinstance(splits, dict):
        return f"splits is {_told(splits)}"
    for name, split in splits.items():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list):
            return f"split {name[:50]!r} lists no shards"
        for shard in shards:
            if not isinstance(shard, dict) or not isinstance(shard.get("name"), str):
                return f"a shard of split {name[:50]!r} is {_told(shard)}, without a name"
            if type(shard.get("samples", 0)) is not int or type(shard.get("bytes", 0)) is not int:
                return f"samples or bytes of shard {shard['name'][:50]!r} are no whole numbers"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
