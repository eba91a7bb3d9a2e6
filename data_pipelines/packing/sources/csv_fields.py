"""What the cells of a CSV become in the json of an image: numbers and lists where a column holds nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.datasets.fields import is_no_value, value_of_text
from data_pipelines.images.issues import shown


class CsvFields:
    """Fields of a table that is all text.

    A column of which every cell that holds a value is a finite number as JSON writes one (so `007` and `+1` are none)
    becomes numbers, one of which every one is a list in JSON becomes lists, and any other stays text. A cell that is
    empty or says that its value is missing (nan, NA, N/A, null) is left out.

    Args:
        names: Of the columns, without those that are no fields.
        rows: All of the table.
        as_they_are: Columns whose cells stay as they are, such as that of groups.
    """

    def __init__(self, names: Sequence[str], rows: Iterable[Mapping[str, str]], as_they_are: Sequence[str]) -> None:
        looked_at = [name for name in names if name not in as_they_are]
        self._kinds: dict[str, Counter[str]] = {name: Counter() for name in looked_at}
        self._odd: dict[str, str] = {}  # of a column that has some numbers or lists, the first text
        self._as_they_are = frozenset(as_they_are)
        self._missing: Counter[str] = Counter()
        for row in rows:
            for name in looked_at:
                if not is_no_value(row[name]):
                    kind = _kind(row[name])
                    self._kinds[name][kind] += 1
                    if kind == "text":
                        self._odd.setdefault(name, row[name])
        self._typed = frozenset(name for name, kinds in self._kinds.items() if len(kinds) == 1 and "text" not in kinds)

    def of_row(self, row: Mapping[str, str]) -> dict[str, Any]:
        """The fields of an image, whose missing ones are counted."""
        found: dict[str, Any] = {}
        for name, text in row.items():
            if name in self._as_they_are:
                found[name] = text
            elif is_no_value(text):
                self._missing[name] += 1
            else:
                found[name] = value_of_text(text) if name in self._typed else text
        return found

    def notes(self) -> list[str]:
        """What was taken for what, and how much is missing, in words."""
        notes = []
        kinds = {kind: [name for name in self._typed if kind in self._kinds[name]] for kind in ("numbers", "lists")}
        told = [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
        if told:
            notes.append(f"fields of the json that are no text but {'; '.join(told)}")
        for name, counts in self._kinds.items():
            kind, count = max(((kind, counts[kind]) for kind in kinds), key=lambda pair: pair[1])
            if name not in self._typed and 2 * count > counts.total():
                odd = f", as {shown(repr(self._odd[name]))} is none" if name in self._odd else ""
                notes.append(f"{count:,} of {counts.total():,} cells of {name} are {kind}, and it stays text{odd}")
        if self._missing:
            each = ", ".join(f"{count:,} of {name}" for name, count in sorted(self._missing.items()))
            notes.append(f"cells without a value (empty, nan, NA, N/A, null) are left out of the json: {each}")
        return notes


def _kind(text: str) -> str:
    value = value_of_text(text)
    return "text" if value is None else "lists" if isinstance(value, list) else "numbers"
