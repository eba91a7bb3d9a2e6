"""What a result holds beside its numbers, as tables: what is confused, how sure, each class (imports no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # names of columns, rows of plain values
_HEADS = ("linear", "knn")
CLASS_COLUMNS = ("class", "linear IoU", "k-NN IoU")


def tables_of(results: dict[str, Any]) -> dict[str, Table]:
    """By name, of every probe of the pretrained row that has them: its confusion matrix, its reliability, and the
    intersection over union of each class of pixels."""
    classes = results["data"].get("classes") or ()
    found: dict[str, Table] = {}
    for probe, result in results["rows"]["pretrained"].items():
        if not isinstance(result, dict):
            continue
        measures = result.get("measures")
        if isinstance(measures, dict):
            if counts := measures.get("confusion"):
                found[f"{probe}_confusion"] = (
                    ("true", "taken for", "images"),
                    list(_confused(counts, measures.get("names") or classes)),
                )
            if bins := measures.get("reliability"):
                names = ("confidence", "accuracy", "count")
                found[f"{probe}_reliability"] = names, [[each[name] for name in names] for each in bins]
        if rows := list(classes_of_pixels(result)):
            found[f"{probe}_classes"] = CLASS_COLUMNS, rows
    return found


def _confused(counts: Sequence[Sequence[int]], classes: Sequence[Any]) -> Iterator[Sequence[Any]]:
    def named(place: int) -> str:
        return str(classes[place] if place < len(classes) else place)

    for true, row in enumerate(counts):
        for taken, count in enumerate(row):
            if count:
                yield named(true), named(taken), count


def classes_of_pixels(result: dict[str, Any]) -> Iterator[Sequence[Any]]:
    """`CLASS_COLUMNS` of each class of a probe that has any: shares, or None where val has none of it."""
    heads = [head for name in _HEADS if isinstance(head := result.get(name), dict)]
    each = [values for head in heads if isinstance(values := head.get("of_class"), dict)]
    if len(each) == len(_HEADS):
        names = result.get("names", {})
        for level in each[0]:
            yield names.get(level, level), *(values.get(level) for values in each)
