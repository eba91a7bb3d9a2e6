"""Which samples belong together, such as images of one patient, by a field of their `.json` (imports no torch)."""

from __future__ import annotations

import numpy as np

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.datasets.groups import NO_GROUP, groups_of

_MOST_NAMED = 5


def read_groups(
    train: Dataset, val: Dataset, held_out: str, field: str, known: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (m,) int64, the group of every labelled sample of both by the text or whole number in `field`.

    `known`: which samples of either are labelled, (n,) and (m,) bool; None: all are read.

    Raises ValueError where a labelled sample has none, and where a group is in both.
    """
    numbers: dict[str, int] = {}
    wanted = known or tuple(np.ones(split.num_samples, dtype=bool) for split in (train, val))
    found = [groups_of(split, which, field, numbers) for split, which in zip((train, val), wanted, strict=True)]
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
