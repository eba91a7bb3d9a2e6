"""The labelled train and val data of a probe, checked before any work, and which classes they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.groups import NO_GROUP
from data_pipelines.datasets.held_out import open_held_out
from data_pipelines.remote.remote_files import Shard
from data_pipelines.remote.urls import redact
from data_pipelines.shards.index import NO_LABEL
from data_pipelines.wording import counted
from eval.base import LabelKind
from eval.groups import read_groups
from eval.labels import Labels, labels_of_field, labels_of_samples

#: Fewer val images than this, or of a class, are warned of.
FEW_VAL, FEW_OF_A_CLASS = 100, 5
_MOST_NAMED = 5


@dataclass(frozen=True)
class Splits:
    """Labelled data to learn from and to test on.

    held_out: what the split to test on is called: val, or test where there is no val.
    labels: what is to be predicted of each sample; probes count classes from 0.
    groups: of every sample of train, and of val, see `read_groups`; `group_by`: by which field. choose_by_groups: train
    has enough of them that a head may be chosen on groups that it does not learn from.
    notes: what was taken for what. unlabelled: no label is asked for, and all samples are probed.
    """

    train: Dataset
    val: Dataset
    held_out: str
    labels: Labels
    groups: tuple[np.ndarray, np.ndarray] | None = None
    group_by: str | None = None
    notes: tuple[str, ...] = ()
    unlabelled: bool = False
    choose_by_groups: bool = True

    @property
    def digest(self) -> str:
        """A hash of what is known of the samples: labels and groups, which lie in fields that no checksum reads."""
        digest = hashlib.sha256(repr(self.labels.classes).encode())
        for values in (self.labels.train, self.labels.val, *(self.groups or ())):
            digest.update(repr((values.shape, values.dtype.str)).encode() + values.tobytes())
        return digest.hexdigest()

    @property
    def num_classes(self) -> int:
        return len(self.labels.classes)

    def wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the samples of train, and of val, that are probed: those with a label, or all."""
        train, val = self.labels.known(False), self.labels.known(True)
        if self.unlabelled:
            return np.arange(len(train)), np.arange(len(val))
        return np.flatnonzero(train), np.flatnonzero(val)

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """The labels of those samples of train, and of val, of which something is known."""
        labels = self.labels
        return labels.train[labels.known(False)], labels.val[labels.known(True)]

    def strata(self) -> torch.Tensor:
        """(n,) int64 of train's known labels, by which a part of train is held out: their classes, or none."""
        train = self.known()[0]
        return torch.from_numpy(train if train.dtype == np.int64 else np.zeros(len(train), dtype=np.int64))

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) how many images of each class train has, and val; of numbers how many images."""
        train, val = self.known()
        if self.labels.kind == "number":
            return np.array([len(train)]), np.array([len(val)])
        if self.labels.kind == "several":
            return train.sum(axis=0).astype(np.int64), val.sum(axis=0).astype(np.int64)
        return np.bincount(train, minlength=self.num_classes), np.bincount(val, minlength=self.num_classes)

    def chance(self) -> dict[str, Any]:
        """Of classes what is reached blindly: 1 / classes of train, and the share of val that is of train's most
        frequent one."""
        if self.labels.kind not in ("class", "grade") or self.unlabelled:
            return {}
        train, val = self.counts()
        return {
            "uniform": 1 / int((train > 0).sum()),
            "most_frequent_class": float(val[train.argmax()] / val.sum()),
        }

    def warnings(self) -> Iterator[str]:
        """What makes the numbers on these data less sure than they look."""
        if self.unlabelled:
            return
        train, val = self.counts()
        num_val = len(self.known()[1])
        of_classes = self.labels.kind != "number"
        if of_classes and (unseen := train == 0).any():
            yield (
                f"{self._named(unseen, val)} only in {self.held_out}: {int(val[unseen].sum()):,} of {num_val:,} "
                "images, which no probe can get right; they count as wrong"
            )
        if of_classes and (untested := val == 0).any():
            yield (
                f"{self._named(untested, train)} only in train: learned from, but nothing says how well they are told"
            )
        if self.groups is not None:
            num_groups = len(np.unique(self.groups[1][self.groups[1] != NO_GROUP]))
            if num_groups < FEW_VAL:
                by = "" if self.group_by == "group" else f" by {self.group_by}"
                yield (
                    f"the {num_val} {self.held_out} images are of {counted(num_groups, 'group')}{by}; "
                    "errors and intervals of so few are rough"
                )
        if num_val < FEW_VAL:
            yield f"only {num_val} {self.held_out} images: read the intervals, not the shares"
        if of_classes and (few := (val > 0) & (val < FEW_OF_A_CLASS)).any():
            yield (
                f"{self._named(few, val)} of fewer than {FEW_OF_A_CLASS} {self.held_out} images: nothing can be said "
                "of these classes by themselves"
            )

    def _named(self, which: np.ndarray, counts: np.ndarray) -> str:
        """`2 classes (5: 3 images, 7: 1 image)`; the first of many."""
        chosen = np.flatnonzero(which)
        parts = [
            f"{self.labels.name(place)}: {counts[place]:,} image{'' if counts[place] == 1 else 's'}"
            for place in chosen[:_MOST_NAMED]
        ]
        more = f", and {len(chosen) - _MOST_NAMED} more" if len(chosen) > _MOST_NAMED else ""
        return f"{len(chosen)} class{'es' * (len(chosen) != 1)} ({', '.join(parts)}{more})"


def open_splits(
    data: str,
    val_data: str | None = None,
    group_by: str | None = None,
    label: str | None = None,
    kind: LabelKind | None = None,
    unlabelled: bool = False,
) -> Splits:
    """The labelled train and val data sets and their classes; refuses what cannot be probed.

    Where `data` has no val split, its test split is the one to test on. `group_by` is a field of each sample's `.json`
    that says which belong together; by default that by which `data` was packed, if it was by one. `label` is a field of
    it that says what is to be predicted, by default the sample's class; `kind` what it is taken for, see
    `eval.labels`. `unlabelled`: no label is needed, as for masks.
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
    notes: tuple[str, ...] = ()
    if label is not None:
        labels, line = labels_of_field(train, val, held_out, label, kind)
        notes = (line,)
    else:
        labels = labels_of_samples(train, val, kind)
        if not unlabelled:
            _check_samples(train, val, held_out)
    if not unlabelled:
        _check(labels, held_out)
    by_default = group_by is None and (val_data is None or train.group_key == val.group_key)
    if by_default:
        group_by = train.group_key
    known = (labels.known(False), labels.known(True))
    groups = None
    if group_by is not None:
        try:
            groups = read_groups(train, val, held_out, group_by, None if unlabelled else known)
        except ValueError as error:
            if not by_default or val_data is None:
                raise
            notes += (f"warning: {error}. Where the names of two packs only happen to be the same, never mind",)
            group_by = None
    return Splits(train, val, held_out, labels, groups, group_by, notes, unlabelled)


def _check_samples(train: Dataset, val: Dataset, held_out: str) -> None:
    """Refuse what the `.cls` of samples can't mean."""
    for name, split in (("train", train), (held_out, val)):
        known = split.labels[split.labels != NO_LABEL]
        if not len(known):
            raise ValueError(
                f"none of the {split.num_samples} {name} samples has a label, and a probe needs labels; pack a folder "
                "with one sub-folder a class, name a labelled data set, or the field of the .json that is to be "
                "predicted (--label FIELD)"
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


def _check(labels: Labels, held_out: str) -> None:
    """Refuse labels of which nothing can be learned, or nothing be tested."""
    learned, tested = labels.train[labels.known(False)], labels.val[labels.known(True)]
    for name, known in (("train", learned), (held_out, tested)):
        if not len(known):
            raise ValueError(f"no sample of {name} has the label {labels.field}; a probe needs some in both splits")
    if labels.kind == "number":
        for name, known in (("train", learned), (held_out, tested)):
            if known.min() == known.max():
                raise ValueError(f"all {len(known)} {name} samples have the number {known[0]:g}: nothing to predict")
        return
    if labels.kind == "several":
        of_train, of_val = (np.flatnonzero(each.any(axis=0)) for each in (learned, tested))
    else:
        of_train, of_val = np.unique(learned), np.unique(tested)
        if len(of_train) < 2:
            raise ValueError(f"train has labels of {len(of_train)} class; a probe tells classes apart and needs two")
    if not np.intersect1d(of_train, of_val).size:
        ends = [
            f"{labels.classes[each[0]]} .. {labels.classes[each[-1]]}" if len(each) else "-"
            for each in (of_train, of_val)
        ]
        raise ValueError(
            f"no class of {held_out} is in train: train has the labels {ends[0]}, {held_out} {ends[1]}; "
            "pack both splits in one command so that a label means the same in both"
        )


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
