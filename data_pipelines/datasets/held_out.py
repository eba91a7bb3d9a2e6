"""Which split of a data set is held out: what online k-NN looks at, and probes are tested on."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.remote.cache import Cache

HELD_OUT = ("val", "test")  # the first that is there


def open_held_out(spec: str | Path, cache: Cache | None = None) -> tuple[Dataset, str]:
    """The `val` split, or `test` where there is no `val`, and which it is; of shards named one by one, just these.

    Raises:
        FileNotFoundError: There is neither; the message says what there is.
    """
    first = None
    for split in HELD_OUT:
        try:
            return open_dataset(spec, split, cache=cache), split
        except FileNotFoundError as error:
            first = first or error
    assert first is not None
    raise first


def held_out_of(folder: Path) -> str | None:
    """The name of the held-out split of a folder, from the names of its files only."""
    return next((split for split in HELD_OUT if any(folder.glob(f"{split}-*.tar"))), None)
