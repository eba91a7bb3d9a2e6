"""A data set of some of another's samples, such as those that have a label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.shards.index import PER_SAMPLE, Findings, Index, one_shard
from data_pipelines.shards.index_format import join


def only(dataset: Dataset, wanted: np.ndarray) -> Dataset:
    """The samples where `wanted` (num_samples,) bool is true, in their order, numbered from 0. Its checksum is one of
    its own, and of all samples that of `dataset`."""
    index, ends = dataset.index, dataset.index.ends.tolist()
    parts = [
        _rows(index.part(shard), wanted[first:last])
        for shard, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    kept = dataset.over(
        dataset.shards, replace(join(parts), knows_maps=index.knows_maps, knows_texts=index.knows_texts)
    )
    for told in ("mean", "std", "classes", "mask_names", "group_key", "depth", "packed"):
        setattr(kept, told, getattr(dataset, told))
    return kept


def _rows(part: Index, wanted: np.ndarray) -> Index:
    """The index of one shard with some of its rows."""
    lengths: np.ndarray = np.diff(part.key_ends.astype(np.int64), prepend=0)
    arrays = {name: getattr(part, name)[wanted].astype(np.int64) for name in PER_SAMPLE if len(getattr(part, name))}
    arrays |= {name: np.zeros(0, np.int64) for name in PER_SAMPLE if not wanted.any()}
    keys = part.keys_bytes[np.repeat(wanted, lengths)].tobytes()
    found = part.findings.get(0, Findings())
    return one_shard(part.names[0], part.identity(0), keys, arrays | {"key_ends": np.cumsum(lengths[wanted])}, found)
