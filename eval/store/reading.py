"""Opens a store: its splits, mapped from the disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from eval.store.decode import MAPPED, decode_store
from eval.store.description import Description, descriptions
from eval.store.matrix import MappedFeatures


class StoredFeatures(MappedFeatures):
    """The features of one split in a store, with its `description`."""

    def __init__(self, folder: Path, description: Description) -> None:
        super().__init__(folder / MAPPED, description.layout, description.digest)
        self.description = description


def open_store(folder: str | Path, say: Callable[[str], None] = lambda line: None) -> dict[str, StoredFeatures]:
    """The splits of a store by name, mapped; `folder` may be that of one split, too.

    The parts are decoded once, into a folder `npy` beside them, which may be deleted. `say` is told when.

    Raises FileNotFoundError where there is no store, ValueError where parts are missing, OSError where the arrays can't
    be written beside them.
    """
    return {name: _open(place, description, say) for name, (place, description) in descriptions(folder).items()}


def _open(folder: Path, description: Description, say: Callable[[str], None]) -> StoredFeatures:
    if description.rows is None:
        there = sum((description.path(folder, number)).is_file() for number in range(description.num_parts))
        raise ValueError(
            f"{folder} is not complete: {there} of {description.num_parts} parts are there; run the same "
            "`selfsight embed` again, and it makes the others"
        )
    with suppress(OSError, ValueError, KeyError, TypeError):
        return StoredFeatures(folder, description)
    decode_store(folder, description, say)
    return StoredFeatures(folder, description)
