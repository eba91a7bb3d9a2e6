"""A field of every sample's `.json`: what labels are read from, and what a text in it says (imports no torch)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from data_pipelines.datasets.dataset import Dataset

_FIRST = 20  # samples whose fields are named
#: What programs write into a table where a value is missing, in small letters.
NO_VALUE = frozenset({"", "nan", "-nan", "<na>", "na", "n/a", "#n/a", "null"})
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,307})(\.[0-9]+)?([eE][-+]?[0-9]+)?")
#: By the data's places and state, and the field: checks before a run and the run itself read each file once.
_known: dict[tuple[str, ...], tuple[Any, ...]] = {}


def read_field(dataset: Dataset, field: str) -> Sequence[Any]:
    """The value of a field in every sample's `.json`, in order; None where a sample has none. Read once a process.

    Raises ValueError and OSError as `Dataset.read_metadata` does.
    """
    key = (*map(str, dataset.shards), dataset.state, field)
    if key not in _known:
        _known[key] = tuple(dataset.read_metadata(sample).get(field) for sample in range(dataset.num_samples))
    return _known[key]


def field_names(dataset: Dataset) -> set[str]:
    """The fields of the first samples."""
    return {name for sample in range(min(_FIRST, dataset.num_samples)) for name in dataset.read_metadata(sample)}


def is_no_value(value: Any) -> bool:
    """Whether a value is missing: null, or a text that says so."""
    return value is None or (isinstance(value, str) and value.strip().lower() in NO_VALUE)


def value_of_text(text: str) -> int | float | list[Any] | None:
    """The finite number or the list that a text is in JSON; None where it is neither, as `007`, `+1` and `inf`."""
    text = text.strip()
    if text.startswith("["):
        try:
            found = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, list) else None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    number = float(text) if match[2] or match[3] else int(text)
    return number if math.isfinite(number) else None


def read_texts(values: Sequence[Any]) -> list[Any] | None:
    """The numbers, or the lists, that all values are which are texts without exception; None where they aren't.

    null stays null, and a text that says that a value is missing becomes one.
    """
    there = [value for value in values if not is_no_value(value)]
    if not there or not all(isinstance(value, str) for value in there):
        return None
    read = {text: value_of_text(text) for text in set(there)}
    if None in read.values() or len({isinstance(value, list) for value in read.values()}) > 1:
        return None
    return [None if is_no_value(value) else read[value] for value in values]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no value of JSON")
