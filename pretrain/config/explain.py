"""What is wrong with values, in words of the settings rather than of the types behind them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pretrain.config.annotations import settings_at
from pretrain.config.describe import takes

#: What pydantic calls the branches of a union of plain types.
_PLAIN_TYPES = {"int", "float", "constrained-int", "constrained-float"}
#: Errors of pydantic's that tell one end of what a setting takes, or its type in a programmer's words.
_OF_VALUES = {
    *("bool_parsing", "bool_type", "int_parsing", "int_type", "int_from_float", "float_parsing", "float_type"),
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
}


def explain(root: type, error: ValidationError) -> str:
    """A line for each setting below `root` that is wrong: what it takes, what was given, where to read on."""
    lines: list[str] = []
    explained: set[str] = set()  # with all that they take: the branches of a union fail each for itself
    for item in error.errors(include_url=False):
        key, kind = _key_of(item)
        if key is None or key in explained:
            continue
        taken = _taken(root, key, kind) if item["type"] in _OF_VALUES else None
        if taken is not None:
            explained.add(key)
            lines = [line for line in lines if not line.startswith(f"{key}: ")]
            plain = ".".join(part for part in key.split(".") if not part.isdigit())
            lines.append(
                f"{key}: this takes {taken} (given: {item['input']!r}); `selfsight settings {plain}` says what it means"
            )
            continue
        line = _line(key, item)
        if lines and key and lines[-1].startswith(f"{key}: "):  # the value may have another type, too
            before = lines.pop()
            if item["type"] == "literal_error":
                given = f" (given: {item['input']!r})"
                line = f"{before.removesuffix(given)}, or {item['msg'].removeprefix('Input should be ')}{given}"
        lines.append(line)
    return "\n".join(lines)


def _key_of(item: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The key that an error is about, and the method or family it was read as; None for what was not meant."""
    # a union's branch (its tag or type) is part of pydantic's location, not of the key
    parts = [str(part) for part in item["loc"]]
    if parts[:2] == ["data", "train"]:
        one_path = parts[2:] == ["str"]
        if isinstance(item["input"], list) if one_path else parts[3:] == []:
            return None, None  # of one path and of a list, only what was meant
        del parts[2:3]
    kind = parts.pop(1) if len(parts) > 1 and parts[0] in {"encoder", "method"} else None
    if len(parts) > 1 and (parts[-1] in _PLAIN_TYPES or parts[-1].startswith("literal[")):
        del parts[-1]
    return ".".join(parts), kind


def _taken(root: type, key: str, kind: str | None) -> str | None:
    """What a setting takes, in words; None where it is not known."""
    found = settings_at(root, key)
    own = [setting for setting in found if setting.kind == kind] or found
    texts = {takes(setting.annotation) for setting in own}
    return texts.pop() if len(texts) == 1 else None


def _line(key: str, item: Mapping[str, Any]) -> str:
    message = item["msg"].removeprefix("Value error, ")
    plain = isinstance(item["input"], Mapping) or item["type"] == "value_error"
    given = "" if plain else f" (given: {item['input']!r})"
    if key == "data.train" and item["input"] is None:
        message, given = "no training shards are named", "; add --data PATH (short for data.train=PATH)"
    elif item["type"] == "union_tag_invalid":
        context = item["ctx"]
        tag, choices = context["tag"], context["expected_tags"]
        near = difflib.get_close_matches(tag, re.findall(r"'(.*?)'", choices), n=1)
        key, given = f"{key}.{context['discriminator'].strip(chr(39))}", f"; did you mean {near[0]}?" if near else ""
        message = f"there is no {tag!r}, there are {choices}"
    elif item["type"] == "tuple_type":
        message, given = f"this takes a list, such as [{item['input']}]", f" (given: {item['input']!r})"
    elif item["type"] == "missing":
        given = f"; set it with {key}=..."
    return f"{key}: {message}{given}" if key else f"{message}{given}"
