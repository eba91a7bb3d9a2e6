"""Which samples belong together, such as images of one patient, by a field of their `.json` (imports no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.shards.index import NO_LABEL

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset

NO_GROUP = -1  # of samples without a label, which no probe reads
_MOST_NAMED = 5


def read_groups(train: Dataset, val: Dataset, held_out: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (m,) int64, the group of every labelled sample of both by the text or whole number in `field`.

    Raises ValueError where a labelled sample has none, and where a group is in both.
    """
    numbers: dict[str, int] = {}
    found = [_groups_of(split, field, numbers) for split in (train, val)]
    both = np.intersect1d(found[0], found[1])
    both = both[both != NO_GROUP]
    if len(both):
        names = {number: name for name, number in numbers.items()}
        told = ", ".join(names[number] for number in both[:_MOST_NAMED].tolist())
        raise ValueError(
            f"{len(both):,} of {len(numbers):,} groups by {field} are in train and in {held_out} ({told}"
            f"{', ...' if len(both) > _MOST_NAMED else ''}); what belongs together looks alike, so every accuracy "
            "would be too good. Pack again so that each group lies in one split"
        )
    return found[0], found[1]


def _groups_of(split: Dataset, field: str, numbers: dict[str, int]) -> np.ndarray:
    groups = np.full(split.num_samples, NO_GROUP)
    for sample in np.flatnonzero(split.labels != NO_LABEL).tolist():
        known = split.read_metadata(sample)
        value = known.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            key, shard = split.key(sample)
            there = f"{field} is {value!r}" if field in known else f"it has {', '.join(sorted(known)) or 'no .json'}"
            raise ValueError(
                f"sample {key} of {shard} belongs to no group: its .json has no text or whole number as {field} "
                f"({there[:200]}); name a field that every labelled sample has"
            )
        groups[sample] = numbers.setdefault(str(value), len(numbers))
    return groups
