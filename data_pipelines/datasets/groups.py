"""The group of each sample, such as its patient, by a field of its `.json` (imports no torch)."""

from __future__ import annotations

import numpy as np

from data_pipelines.datasets.dataset import Dataset

NO_GROUP = -1  # of samples that are not asked for


def groups_of(split: Dataset, wanted: np.ndarray, field: str, numbers: dict[str, int]) -> np.ndarray:
    """(n,) int64 groups of the `wanted` (n,) bool samples of one split, of others -1; new ones go on in `numbers`.

    Raises ValueError for a wanted sample without one.
    """
    groups = np.full(split.num_samples, NO_GROUP)
    for sample in np.flatnonzero(wanted).tolist():
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
