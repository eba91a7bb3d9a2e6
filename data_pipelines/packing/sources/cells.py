"""What the columns of a table say of an image: its label, split and group, alike in lists and tables with images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.packing.sources.splits import AS_TRAIN, split_kind

LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category")
SPLIT_COLUMNS = ("split",)
_WHOLE_NUMBER = re.compile(r"([-+]?[0-9]{1,9})(\.0*)?")  # 7, and the 7.0 that tables with gaps make of it
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
#: What programs write of a value that is missing; the further words may be classes where labels are text.
_MISSING = ("", "nan", "<na>")
_MISSING_NUMBERS = (*_MISSING, "na", "n/a", "#n/a", "-nan", "null", "none", "inf", "-inf")


def look_at_labels(values: Iterable[Any], typed: bool) -> tuple[bool, str | None]:
    """Whether labels are whole numbers throughout, else text; and a number with a fraction, if all are numbers and some
    have one. Such are there to be predicted and are no classes.

    Args:
        values: All of a column.
        typed: Whether text that is a number was meant to be text; of a CSV all is text.
    """
    fractions: set[str] = set()
    num_known = 0
    for value in map(stripped, values):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            continue
        text = str(value)
        if text.lower() in _MISSING_NUMBERS:
            continue
        num_known += 1
        if not _NUMBER.fullmatch(text) or (isinstance(value, str) and typed):
            return False, None
        if not float(text).is_integer() and len(fractions) < 1000:
            fractions.add(text)
    return not fractions and num_known > 0, min(fractions, default=None)


def label_of_cell(value: Any, are_numbers: bool, what: str) -> str | int | None:
    """A label as text without blanks around it, or as a number of 0 or more; None where it is missing, or below 0.

    Raises:
        ValueError: It is neither; `what` it is, the message says.
    """
    value = stripped(value)
    if isinstance(value, float):
        value = None if not math.isfinite(value) else int(value) if value.is_integer() else value
    if value is None or (isinstance(value, str) and value.lower() in (_MISSING_NUMBERS if are_numbers else _MISSING)):
        return None
    if are_numbers and isinstance(value, str):
        match = _WHOLE_NUMBER.fullmatch(value)
        value = int(match[1] if match else float(value))
    if isinstance(value, int):
        return int(value) if value >= 0 else None
    if isinstance(value, str):
        return value
    raise ValueError(
        f"{what} is {value!r}; a label is text or a whole number. Choose another column (--label-column), or pack "
        "without labels (--no-labels)"
    )


def fractions_note(table: Path, column: str, fraction: str, wanted: bool) -> str:
    """What to say of a column of numbers with fractions, which is not taken; ValueError if it was `wanted`."""
    what = f"column {column} holds numbers with fractions, such as {fraction}, which are no classes"
    if wanted:
        raise ValueError(
            f"{table}: {what}; leave out --label-column to have them in the json of each image, or name a column "
            "of classes"
        )
    return f"{what}: no labels are packed, and the numbers are in the json of each image"


def unlabelled_note(count: int, column: str) -> str:
    """What to say of images without a label."""
    return f"{count:,} images have no label in column {column}"


def split_of_cell(value: Any, of_file: str | None = None) -> str | None:
    """The split that a value names, by its kind or by its name; where it is missing, that which the file is of.

    A value of no kind that is known (en, part1) does not count where the file is of a split; nor is a held-out file's
    image trained on because it is called extra or unlabeled.
    """
    text = "" if value is None else str(value).strip()
    if text.lower() in _MISSING_NUMBERS:
        return of_file
    kind = split_kind(text)
    if of_file is not None and (kind is None or (kind in AS_TRAIN and of_file in ("val", "test"))):
        return of_file
    return kind or text


def group_text(value: Any, column: str, what: str) -> str:
    """The group of an image; ValueError where it has none."""
    text = "" if value is None else str(value).strip()
    if text.lower() in _MISSING:
        raise ValueError(
            f"{what} is of no group: its column {column} is {value!r} (--group-column), and every image needs one so "
            "that none is on both sides. Fill the gap, or leave the row out"
        )
    return text


def find_column(
    names: Sequence[str], wanted: str | None, usual: Sequence[str], table: Path, what: str, option: str
) -> str:
    """The column that is wanted, or the one with a usual name; in any case and with blanks around it.

    Raises:
        ValueError: There is none, or several differ only so; names those there are.
    """
    if wanted is not None:
        found = [wanted] if wanted in names else [name for name in names if _plain(name) == _plain(wanted)]
        if not found:
            raise ValueError(f"{table} has no column {wanted!r} for {what}; it has {', '.join(names)}")
    else:
        found = usual_columns(names, usual)
    if not found:
        raise ValueError(
            f"{table} has no column of {what} by a usual name ({', '.join(usual)}); it has {', '.join(names)}. Name "
            f"one by {option}"
        )
    same = [name for name in found if _plain(name) == _plain(found[0])]
    if len(same) > 1 and found[0] != _plain(found[0]) and found[0] != wanted:
        raise ValueError(f"{table} has the columns {', '.join(map(repr, same))}; name one by {option}")
    return found[0]


def usual_columns(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Those with a usual name, the most usual first; exactly so before in another case or with blanks around."""
    return [name for one in usual for name in sorted(names, key=lambda name: name != one) if _plain(name) == one]


def stripped(value: Any) -> Any:
    """Text without blanks around it; anything else as it is."""
    return value.strip() if isinstance(value, str) else value


def _plain(name: str) -> str:
    return name.strip().lower()
