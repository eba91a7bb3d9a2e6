"""The classes of masks: which levels there are, told by reading all of them once before a run starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from data_pipelines.cores import cores_per_process
from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.issues import shown


@lru_cache(maxsize=4)
def levels_of(checksum: str, dataset: Dataset, name: str) -> tuple[int, ...]:
    """The levels of all masks of a data set, ascending, but for the highest, which is not to be judged.

    Read once a process, by the data's checksum. Raises ValueError for a sample without a mask, or a damaged one.
    """
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
    return tuple(sorted(found))


def places_of(keys: tuple[int, ...]) -> np.ndarray:
    """(l + 2,) int64: by a level and one, its place among the classes; -1 for what is not to be judged."""
    table = np.full(max(keys) + 2, -1, dtype=np.int64)
    table[np.array(keys) + 1] = np.arange(len(keys))
    return table
