"""A field of every sample's `.json`: what labels are read from (imports no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipelines.datasets.dataset import Dataset

_FIRST = 20  # samples whose fields are named
#: By the data's places and state, and the field: checks before a run and the run itself read each file once.
_known: dict[tuple[str, ...], tuple[Any, ...]] = {}


def read_field(dataset: Dataset, field: str) -> Sequence[Any]:
    """The value of a field in every sample's `.json`, in order; None where a sample has none. Read once a process.

    Raises ValueError and OSError as `Dataset.read_metadata` does.
    """
    key = (*map(str, dataset.shards), dataset.state, field)
    if key not in _known:
        _known[key] = tuple(dataset.read_metadata(sample).get(field) for sample in range(dataset.num_samples))
    return _known[key]


def field_names(dataset: Dataset) -> set[str]:
    """The fields of the first samples."""
    return {name for sample in range(min(_FIRST, dataset.num_samples)) for name in dataset.read_metadata(sample)}
