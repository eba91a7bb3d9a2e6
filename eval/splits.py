"""The labelled train and val data of a probe, checked before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.remote.remote_files import Shard
from data_pipelines.remote.urls import redact
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.shards.held_out import open_held_out


def open_splits(data: str, val_data: str | None = None) -> tuple[Dataset, Dataset, int]:
    """The labelled train and val data sets and the number of classes; refuses what cannot be probed.

    Where a folder has no val split, its test split is held out instead (`held_out.split_told_by` says which it is).
    """
    if val_data is None and Path(data).expanduser().exists() and not Path(data).expanduser().is_dir():
        raise ValueError(
            f"{redact(data)} is one shard, not a folder with train and val shards; name the other split as val_data"
        )
    train = open_dataset(data, "train")
    try:
        val, _ = open_held_out(val_data or data)
    except FileNotFoundError as error:
        if val_data is not None:
            raise
        raise FileNotFoundError(
            f"no val split to test on: {error}. Make one with `selfsight pack IMAGES {redact(data)} --val-share 0.1`"
        ) from error
    if train.checksum == val.checksum:
        raise ValueError(
            f"train and val of {redact(data)} are the same samples; a probe needs val samples that train does not hold"
        )
    both = {_place(shard) for shard in train.shards} & {_place(shard) for shard in val.shards}
    if both:
        raise ValueError(
            f"{len(both)} shards are in train and in val, the first of them {redact(min(both))}; what a probe has "
            "learned from says nothing when it is tested on. Name the splits so that they share no shard"
        )
    for name, split in (("train", train), ("val", val)):
        if not (split.labels >= 0).any():
            raise ValueError(
                f"none of the {split.num_samples} {name} samples has a label, and a probe needs labels; pack a folder "
                "with one sub-folder a class, or name a labelled data set"
            )
    if train.classes != val.classes:
        raise ValueError(
            f"train names {len(train.classes or ())} classes and val {len(val.classes or ())}, or in another order; "
            "pack both splits in one command so that a label means the same in both"
        )
    known = train.labels[train.labels >= 0]
    num_classes = len(train.classes) if train.classes else int(known.max()) + 1
    for name, split in (("train", train), ("val", val)):
        if int(split.labels.max()) >= num_classes:
            raise ValueError(
                f"{name} has the label {int(split.labels.max())}, but there are {num_classes} classes (0 .. "
                f"{num_classes - 1}); pack both splits in one command so that a label means the same in both"
            )
    if num_classes < 2 or len(np.unique(known)) < 2:
        raise ValueError(
            f"train has labels of {len(np.unique(known))} class; a probe tells classes apart and needs two"
        )
    return train, val, num_classes


def _place(shard: Shard) -> str:
    return str(shard.resolve()) if isinstance(shard, Path) else shard.url


def chance(train: Dataset, val: Dataset, num_classes: int) -> dict[str, Any]:
    """What is reached blindly: 1 / classes, and the share of val that is of train's most frequent class."""
    frequent = int(np.bincount(train.labels[train.labels >= 0]).argmax())
    known = val.labels[val.labels >= 0]
    return {"uniform": 1 / num_classes, "most_frequent_class": float((known == frequent).mean())}
