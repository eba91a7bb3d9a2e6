"""The classes of masks: which levels there are, told by reading all of them once before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines.cores import cores_per_process
from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import Dataset

#: By the data's places and checksum: checks before a run and the run itself read each mask once.
_levels: dict[tuple[str, ...], tuple[int, ...]] = {}


def levels_of(dataset: Dataset, name: str) -> tuple[int, ...]:
    """The levels of all masks of a data set, ascending, but for the highest, which is not to be judged.

    Raises ValueError where no sample has a mask, or one is damaged.
    """
    of = (*map(str, dataset.shards), dataset.checksum)
    if of in _levels:
        return _levels[of]
    there = np.flatnonzero(maps.which_have(dataset, "mask"))
    if not len(there):
        raise ValueError(
            f"all of {dataset.num_samples:,} samples of {name} have no mask; pack images with theirs (`selfsight pack "
            "IMAGES SHARDS --masks FOLDER`)"
        )

    def levels(sample: int) -> np.ndarray:
        mask = maps.read(dataset, sample, "mask")
        assert mask is not None
        found = np.unique(mask)
        return found[found != np.iinfo(mask.dtype).max]

    with ThreadPoolExecutor(cores_per_process()) as pool:
        found = set[int]()
        for each in pool.map(levels, there.tolist()):
            found.update(each.tolist())
    _levels[of] = tuple(sorted(found))
    return _levels[of]


def names_of(datasets: Sequence[Dataset], sources: Sequence[str], keys: Sequence[int]) -> tuple[str, ...]:
    """What the levels `keys` are called by the data, each once; the level where they do not say. Raises ValueError
    where two data sets call one differently."""
    names: dict[int, tuple[str, str]] = {}
    for dataset, source in zip(datasets, sources, strict=True):
        for level, name in dataset.mask_names.items():
            told, by = names.setdefault(level, (name, source))
            if told != name and level in keys:
                raise ValueError(
                    f"level {level} of masks is {told} in {by} and {name} in {source}, so that a number of one may "
                    "stand for another class of the other; pack them with the same --mask-names"
                )
    called = [names[key][0] if key in names else str(key) for key in keys]
    return tuple(name if called.count(name) == 1 else f"{key} {name}" for key, name in zip(keys, called, strict=True))


def places_of(keys: tuple[int, ...]) -> np.ndarray:
    """(l + 2,) int64: by a level and one, its place among the classes; -1 for what is not to be judged."""
    table = np.full(max(keys) + 2, -1, dtype=np.int64)
    table[np.array(keys) + 1] = np.arange(len(keys))
    return table
