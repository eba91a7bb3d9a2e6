"""The masks and depths of a data set, sample by sample; how they are stored, says `images.maps`."""

from __future__ import annotations

import numpy as np

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.issues import shown
from data_pipelines.images.maps import read_map


def which_have(dataset: Dataset, kind: str) -> np.ndarray:
    """(num_samples,) bool: the samples with a map of a kind, "mask" or "depth".

    Raises:
        ValueError: The index of the shards is of a version that did not look for them.
    """
    if not dataset.index.knows_maps:
        raise ValueError(
            f"the index of {shown(str(dataset.shards[0]))} was written by an earlier version, which did not look for "
            "masks and depths; remove the .index files beside the shards and publish new ones, and they are found"
        )
    if not dataset.index.has(kind):
        return np.zeros(dataset.num_samples, dtype=bool)
    return np.asarray(getattr(dataset.index, f"{kind}_sizes")) > 0


def read(dataset: Dataset, sample: int, kind: str, size: tuple[int, int] | None = None) -> np.ndarray | None:
    """The map of a sample, (h, w) as `images.maps` decodes it; None where it has none.

    Args:
        dataset: Where to read.
        sample: Its number.
        kind: "mask" or "depth".
        size: Height and width of its image; None: any.

    Raises:
        BadMapError: Damaged, no map, or of another size than its image.
        IndexError, DamageError, OSError: As of `Dataset.read`.
    """
    content = dataset.read_beside(sample, kind)
    if content is None:
        return None
    key, shard = dataset.key(sample)
    return read_map(kind, content, size, f"sample {shown(key)} of {shown(str(shard))}")
