"""What is known of each image: the class it was packed with, or what a field of its `.json` says (imports no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from data_pipelines.datasets.fields import field_names, is_no_value, read_field, read_texts, value_of_text
from data_pipelines.shards.index import NO_LABEL
from eval.base import LabelKind

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset

KINDS: tuple[LabelKind, ...] = get_args(LabelKind)
_MOST_NAMED = 5
_SAID = {
    "class": "a text or whole number",
    "several": "a list of texts or whole numbers, empty for none of them",
    "number": "a number",
    "grade": "a whole number",
}


@dataclass(frozen=True)
class Labels:
    """The labels of every sample of train and of val.

    classes: what they are called in the data, in order: integers or texts; empty for numbers.
    train, val: of classes and grades (n,) int64, places in `classes`, NO_LABEL where unknown; of several (n, classes)
        float32 of 0 and 1, of number (n,) float32, with NaN where unknown.
    field: of the `.json` it was read from; None: the class of each sample (`.cls`).
    names: of each class in words, where the data set has any.
    """

    kind: LabelKind
    train: np.ndarray
    val: np.ndarray
    classes: tuple[Any, ...] = ()
    field: str | None = None
    names: tuple[str, ...] = ()

    def known(self, of_val: bool) -> np.ndarray:
        """(n,) bool: of which samples of train, or of val, something is known."""
        values = self.val if of_val else self.train
        if values.dtype == np.int64:
            return values != NO_LABEL
        return ~np.isnan(values if values.ndim == 1 else values[:, :1].sum(axis=1))

    def name(self, place: int) -> str:
        """A class as people read it: `3 cat`."""
        label = str(self.classes[place])
        return f"{label} {self.names[place]}" if self.names and self.names[place] != label else label


def labels_of_samples(train: Dataset, val: Dataset, kind: LabelKind | None = None) -> Labels:
    """Of the `.cls` of each sample: classes; by `kind` grades, or numbers."""
    if kind == "several":
        raise ValueError(
            "a sample's .cls is one class; name the field of the .json that lists several, as --label tags"
        )
    learned, tested = (np.asarray(split.labels).astype(np.int64) for split in (train, val))
    if kind == "number":
        numbers = (np.where(each == NO_LABEL, np.nan, each).astype(np.float32) for each in (learned, tested))
        return Labels("number", next(numbers), next(numbers))
    classes = np.unique(np.concatenate([learned, tested]))
    classes = classes[classes != NO_LABEL]
    names = train.classes
    told = tuple(names[c] if 0 <= c < len(names) else str(c) for c in classes.tolist()) if names else ()
    return Labels(
        kind or "class", _places(learned, classes), _places(tested, classes), tuple(classes.tolist()), None, told
    )


def labels_of_field(
    train: Dataset, val: Dataset, held_out: str, field: str, kind: LabelKind | None = None
) -> tuple[Labels, str]:
    """Of a `field` of each sample's `.json`, and a line that says what they were taken for.

    Without a `kind` texts and truth values are classes, lists are several, numbers with a fraction are numbers, and
    whole numbers are classes. A sample without the field, or with null, has no label. Texts that are numbers, or lists
    in JSON, are read as such where all are, or where the `kind` says what they are. Raises ValueError for values that
    are not of the kind, naming the first of them.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"the kind of label is {kind!r}; it is one of {', '.join(KINDS)}")
    values, from_texts = _with_texts_read([read_field(split, field) for split in (train, val)], kind)
    there = [value for each in values for value in each if value is not None]
    if not there:
        seen = sorted({name for split in (train, val) for name in field_names(split)})
        raise ValueError(
            f"no sample of train or of {held_out} has the field {field} in its .json; "
            f"the first have {', '.join(seen) or 'no .json'}"
        )
    taken = kind or _kind_of(there)
    for split, each in zip((train, val), values, strict=True):
        for sample, value in enumerate(each):
            if value is not None and not _is(value, taken):
                key, shard = split.key(sample)
                asked = "" if kind is not None else ", as the other samples' are (--label-kind says another kind)"
                raise ValueError(
                    f"{field} of sample {key} of {shard} is {str(value)[:80]!r}; labels of kind {taken} are "
                    f"{_SAID[taken]} each{asked}"
                )
    labels = _number(field, values) if taken == "number" else _classes(taken, field, values)
    return labels, _line(labels, kind is None, len(there)) + from_texts


def _with_texts_read(values: Sequence[Sequence[Any]], kind: LabelKind | None) -> tuple[list[Sequence[Any]], str]:
    """The values of train and of val, texts that stand for numbers or lists read, and what to say of that."""
    together = [value for each in values for value in each]
    if kind is None:
        read = read_texts(together)
    elif kind == "class" or not any(isinstance(value, str) for value in together):
        read = None
    else:
        read = [_read(value, kind) for value in together]
    if read is None or read == together:
        return list(values), ""
    what = "lists" if any(isinstance(value, list) for value in read) else "numbers"
    gone = sum(value is None for value in read) - sum(value is None for value in together)
    left_out = f", and {gone:,} that say no value left out" if gone else ""
    parts: list[Sequence[Any]] = [read[: len(values[0])], read[len(values[0]) :]]
    return parts, f"; they are texts in the .json, read as {what}{left_out}"


def _read(value: Any, kind: LabelKind) -> Any:
    """What a text says of a label of a kind; the text where that is nothing."""
    if not isinstance(value, str):
        return value
    if is_no_value(value):
        return None
    found = value_of_text(value)
    return found if found is not None and isinstance(found, list) == (kind == "several") else value


def _is(value: Any, kind: LabelKind) -> bool:
    if kind == "several":
        return isinstance(value, list) and all(isinstance(each, str | int) for each in value)
    if kind == "class":
        return isinstance(value, str | int)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return kind == "number" or isinstance(value, int)


def _kind_of(values: Sequence[Any]) -> LabelKind:
    first = values[0]
    if isinstance(first, list):
        return "several"
    if any(isinstance(value, float) for value in values) and not isinstance(first, str):
        return "number"
    return "class"


def _number(field: str, values: Sequence[Sequence[Any]]) -> Labels:
    train, val = (np.array([np.nan if v is None else v for v in each], dtype=np.float32) for each in values)
    return Labels("number", train, val, (), field)


def _classes(kind: LabelKind, field: str, values: Sequence[Sequence[Any]]) -> Labels:
    known = [value for each in values for value in each if value is not None]
    flat = {value for many in known for value in many} if kind == "several" else set(known)
    texts = any(isinstance(value, str) for value in flat)
    # "1" and 1 are one class where there are texts at all; and true is one, not 1
    named = {value: str(value) if texts or isinstance(value, bool) else value for value in flat}
    classes = tuple(sorted(set(named.values())))
    place = {value: classes.index(name) for value, name in named.items()}
    if kind == "several":
        train, val = (_table(each, place, len(classes)) for each in values)
    else:
        train, val = (np.array([NO_LABEL if v is None else place[v] for v in each], dtype=np.int64) for each in values)
    return Labels(kind, train, val, classes, field)


def _table(values: Sequence[list[Any] | None], place: dict[Any, int], num_classes: int) -> np.ndarray:
    """(n, classes) 1 where an image has the class, 0 where not, NaN where nothing is known."""
    table = np.zeros((len(values), num_classes), dtype=np.float32)
    for row, many in enumerate(values):
        if many is None:
            table[row] = np.nan
        else:
            table[row, [place[value] for value in many]] = 1
    return table


def _line(labels: Labels, guessed: bool, num: int) -> str:
    shown = ", ".join(map(str, labels.classes[:_MOST_NAMED])) + (", ..." if len(labels.classes) > _MOST_NAMED else "")
    what = "numbers to predict" if labels.kind == "number" else f"{len(labels.classes)} classes ({shown})"
    several = {"several": ", any number of them an image", "grade": ", in order"}.get(labels.kind, "")
    advice = "; --label-kind number or grade takes them for such" if (
        guessed and labels.kind == "class" and all(isinstance(each, int) for each in labels.classes)
    ) else ""  # fmt: skip
    return f"label {labels.field} of {num:,} samples: {what}{several}{advice}"


def _places(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    if not len(classes):
        return np.full(len(labels), NO_LABEL, dtype=np.int64)
    return np.where(labels == NO_LABEL, NO_LABEL, np.searchsorted(classes, labels)).astype(np.int64)
