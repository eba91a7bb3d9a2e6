"""What the levels of masks are called, as a file says that is named at packing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_pipelines.images.issues import shown

_MOST_LEVEL = 65534  # the highest of 16 bits is not to be judged
_LINE = re.compile(r"\s*(\d+)\s*[\s,;:=]\s*(.*\S)\s*")


def read_mask_names(path: Path) -> dict[str, str]:
    """The names of levels, ascending, by the level as text (as JSON has it).

    The file is a JSON object, `{"0": "sky", "1": "tree"}`, or has a line for each level, `0 sky` or `0,sky`; lines
    that are empty or begin with # say nothing.

    Raises FileNotFoundError, and ValueError for what is no level or has two names.
    """
    text = path.expanduser().read_text(encoding="utf-8-sig")
    pairs = _of_json(text, path) if text.lstrip().startswith("{") else _of_lines(text, path)
    found: dict[int, str] = {}
    for level, name in pairs:
        if not level.isascii() or not level.isdigit() or int(level) > _MOST_LEVEL:
            raise ValueError(f"{path} names the level {shown(level)}; levels are whole numbers of 0 .. {_MOST_LEVEL}")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path} calls the level {level} {shown(repr(name))}; a name is a text")
        if found.setdefault(int(level), name.strip()) != name.strip():
            raise ValueError(f"{path} calls the level {level} both {found[int(level)]} and {name.strip()}; keep one")
    if not found:
        raise ValueError(f"{path} names no level; give a line for each, such as `0 sky`")
    return {str(level): found[level] for level in sorted(found)}


def _of_json(text: str, path: Path) -> list[tuple[str, Any]]:
    def pairs(members: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return members  # an object would keep the last of two names

    try:
        found = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return list(found)


def _of_lines(text: str, path: Path) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"line {number} of {path} is {shown(line)}; a line is a level of the masks and its name, as `0 sky`"
            )
        found.append((match[1], match[2]))
    return found
