"""The classes of masks: which levels there are, told by reading all of them once before a run starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines.cores import cores_per_process
from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.issues import shown

#: By the data's places and checksum: checks before a run and the run itself read each mask once.
_levels: dict[tuple[str, ...], tuple[int, ...]] = {}


def levels_of(dataset: Dataset, name: str) -> tuple[int, ...]:
    """The levels of all masks of a data set, ascending, but for the highest, which is not to be judged.

    Raises ValueError for a sample without a mask, or a damaged one.
    """
    of = (*map(str, dataset.shards), dataset.checksum)
    if of in _levels:
        return _levels[of]
    missing = np.flatnonzero(~maps.which_have(dataset, "mask"))
    if len(missing):
        key, shard = dataset.key(int(missing[0]))
        raise ValueError(
            f"{len(missing):,} of {dataset.num_samples:,} samples of {name} have no mask, such as {shown(key)} of "
            f"{shard}; pack images with theirs (`selfsight pack IMAGES SHARDS --masks FOLDER`)"
        )

    def levels(sample: int) -> np.ndarray:
        mask = maps.read(dataset, sample, "mask")
        assert mask is not None
        found = np.unique(mask)
        return found[found != np.iinfo(mask.dtype).max]

    with ThreadPoolExecutor(cores_per_process()) as pool:
        found = set[int]()
        for each in pool.map(levels, range(dataset.num_samples)):
            found.update(each.tolist())
    _levels[of] = tuple(sorted(found))
    return _levels[of]


def places_of(keys: tuple[int, ...]) -> np.ndarray:
    """(l + 2,) int64: by a level and one, its place among the classes; -1 for what is not to be judged."""
    table = np.full(max(keys) + 2, -1, dtype=np.int64)
    table[np.array(keys) + 1] = np.arange(len(keys))
    return table
