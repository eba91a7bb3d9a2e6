"""The labelled train and val data of a probe, checked before any work, and which classes they are of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.held_out import open_held_out
from data_pipelines.remote.remote_files import Shard
from data_pipelines.remote.urls import redact
from data_pipelines.shards.index import NO_LABEL
from data_pipelines.wording import counted
from eval.groups import NO_GROUP, read_groups

#: Fewer val images than this, or of a class, are warned of.
FEW_VAL, FEW_OF_A_CLASS = 100, 5
_MOST_NAMED = 5


@dataclass(frozen=True)
class Splits:
    """Labelled data to learn from and to test on.

    held_out: what the split to test on is called: val, or test where there is no val.
    classes: (n,) int64, ascending: the labels that train or val has, as the data have them. Probes count them from 0.
    groups: of every sample of train, and of val, see `read_groups`; `group_by`: by which field.
    """

    train: Dataset
    val: Dataset
    held_out: str
    classes: np.ndarray
    groups: tuple[np.ndarray, np.ndarray] | None = None
    group_by: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def numbers(self, labels: np.ndarray) -> np.ndarray:
        """Labels as the data have them -> places in `classes`."""
        return np.searchsorted(self.classes, labels)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) how many images of each class train has, and val."""
        train, val = (
            np.bincount(self.numbers(known_labels(split)), minlength=self.num_classes)
            for split in (self.train, self.val)
        )
        return train, val

    def chance(self) -> dict[str, Any]:
        """What is reached blindly: 1 / classes of train, and the share of val that is of train's most frequent one."""
        train, val = self.counts()
        return {
            "uniform": 1 / int((train > 0).sum()),
            "most_frequent_class": float(val[train.argmax()] / val.sum()),
        }

    def warnings(self) -> Iterator[str]:
        """What makes the numbers on these data less sure than they look."""
        train, val = self.counts()
        if (unseen := train == 0).any():
            yield (
                f"{self._named(unseen, val)} only in {self.held_out}: {int(val[unseen].sum()):,} of {val.sum():,} "
                "images, which no probe can get right; they count as wrong"
            )
        if (untested := val == 0).any():
            yield (
                f"{self._named(untested, train)} only in train: learned from, but nothing says how well they are told"
            )
        if self.groups is not None:
            num_groups = len(np.unique(self.groups[1][self.groups[1] != NO_GROUP]))
            if num_groups < FEW_VAL:
                by = "" if self.group_by == "group" else f" by {self.group_by}"
                yield (
                    f"the {val.sum()} {self.held_out} images are of {counted(num_groups, 'group')}{by}; "
                    "errors and intervals take images for independent, and are too small"
                )
        if val.sum() < FEW_VAL:
            yield f"only {val.sum()} {self.held_out} images: read the intervals, not the shares"
        if (few := (val > 0) & (val < FEW_OF_A_CLASS)).any():
            yield (
                f"{self._named(few, val)} of fewer than {FEW_OF_A_CLASS} {self.held_out} images: nothing can be said "
                "of these classes by themselves"
            )

    def _named(self, which: np.ndarray, counts: np.ndarray) -> str:
        """`2 classes (5: 3 images, 7: 1 image)`; the first of many."""
        chosen = np.flatnonzero(which)
        parts = [
            f"{self._name(place)}: {counts[place]:,} image{'' if counts[place] == 1 else 's'}"
            for place in chosen[:_MOST_NAMED]
        ]
        more = f", and {len(chosen) - _MOST_NAMED} more" if len(chosen) > _MOST_NAMED else ""
        return f"{len(chosen)} class{'es' * (len(chosen) != 1)} ({', '.join(parts)}{more})"

    def _name(self, place: int) -> str:
        label, names = int(self.classes[place]), self.train.classes
        return f"{label} {names[label]}" if names and 0 <= label < len(names) else str(label)


def known_labels(split: Dataset) -> np.ndarray:
    """The labels of those samples that have one."""
    return split.labels[split.labels != NO_LABEL].astype(np.int64)


def open_splits(data: str, val_data: str | None = None, group_by: str | None = None) -> Splits:
    """The labelled train and val data sets and their classes; refuses what cannot be probed.

    Where `data` has no val split, its test split is the one to test on. `group_by` is a field of each sample's `.json`
    that says which belong together; by default that by which `data` was packed, if it was by one.
    """
    if val_data is None and Path(data).expanduser().exists() and not Path(data).expanduser().is_dir():
        raise ValueError(
            f"{redact(data)} is one shard, not a folder with train and val shards; name the other split as val_data"
        )
    train = open_dataset(data, "train")
    val, held_out = _held_out(data, val_data)
    if train.checksum == val.checksum:
        raise ValueError(
            f"train and val of {redact(data)} are the same samples; a probe needs val samples that train does not hold"
        )
    both = {_place(shard) for shard in train.shards} & {_place(shard) for shard in val.shards}
    if both:
        raise ValueError(
            f"{counted(len(both), 'shard')} both in train and in val, the first of them {redact(min(both))}; what "
            "a probe has learned from says nothing when it is tested on. Name the splits so that they share no shard"
        )
    for name, split in (("train", train), (held_out, val)):
        known = known_labels(split)
        if not len(known):
            raise ValueError(
                f"none of the {split.num_samples} {name} samples has a label, and a probe needs labels; pack a folder "
                "with one sub-folder a class, or name a labelled data set"
            )
        if split.classes and int(known.max()) >= len(split.classes):
            raise ValueError(
                f"{name} has the label {int(known.max())}, but there are {len(split.classes)} classes (0 .. "
                f"{len(split.classes) - 1}); pack both splits in one command so that a label means the same in both"
            )
    if train.classes != val.classes:
        raise ValueError(
            f"train names {len(train.classes or ())} classes and {held_out} {len(val.classes or ())}, or in another "
            "order; pack both splits in one command so that a label means the same in both"
        )
    learned, tested = (np.unique(known_labels(split)) for split in (train, val))
    if len(learned) < 2:
        raise ValueError(f"train has labels of {len(learned)} class; a probe tells classes apart and needs two")
    if not np.intersect1d(learned, tested).size:
        raise ValueError(
            f"no class of {held_out} is in train: train has the labels {learned[0]} .. {learned[-1]}, {held_out} "
            f"{tested[0]} .. {tested[-1]}; pack both splits in one command so that a label means the same in both"
        )
    if group_by is None and val_data is None:
        group_by = train.group_key
    groups = None if group_by is None else read_groups(train, val, held_out, group_by)
    return Splits(train, val, held_out, np.union1d(learned, tested), groups, group_by)


def _held_out(data: str, val_data: str | None) -> tuple[Dataset, str]:
    """The split to test on and what it is called."""
    try:
        return open_held_out(val_data or data)
    except FileNotFoundError as error:
        if val_data is not None:
            raise
        raise FileNotFoundError(
            f"no val split to test on, nor a test split: {error}. Hold images back where they are packed (--val-share "
            "0.1, with --group-pattern or --group-column where images belong together), and do not train on them"
        ) from error


def _place(shard: Shard) -> str:
    return str(shard.resolve()) if isinstance(shard, Path) else shard.url
