"""The captions of a data set, sample by sample: of `KEY.txt`, or of a field of `KEY.json` (imports no torch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.issues import shown

TXT, JSON = "txt", "json:"


class Captions:
    """What the samples of a data set are called.

    Args:
        dataset: Whose.
        where: `txt`: each line of `KEY.txt` that is not blank. `json:FIELD`: of `KEY.json`, a string or a list of them.

    Raises:
        ValueError: `where` is neither.
    """

    def __init__(self, dataset: Dataset, where: str) -> None:
        if where != TXT and not (where.startswith(JSON) and where.removeprefix(JSON).strip()):
            raise ValueError(f"captions are asked for as {where!r}; it must be txt or json:FIELD, such as json:caption")
        self.dataset, self.where = dataset, where

    def of(self, sample: int) -> tuple[str, ...]:
        """The captions of a sample, one at least.

        Raises:
            ValueError: It has none; the message names it.
            OSError: As of `Dataset.read`.
        """
        if self.where == TXT:
            stored = self.dataset.read_beside(sample, "text")
            found: Sequence[object] = () if stored is None else stored.decode("utf-8", "replace").splitlines()
        else:
            value = self.dataset.read_metadata(sample).get(self.where.removeprefix(JSON))
            found = value if isinstance(value, list) else [value]
        texts = tuple(" ".join(text.split()) for text in found if isinstance(text, str) and text.strip())
        if not texts:
            key, shard = self.dataset.key(sample)
            raise ValueError(f"{shown(key)} in {shown(str(shard))} has no caption ({self.told}); {ADVICE}")
        return texts

    @property
    def told(self) -> str:
        """Where they are looked for, in words."""
        return "its .txt" if self.where == TXT else f"{self.where.removeprefix(JSON)!r} of its .json"

    def check(self, name: str) -> None:
        """Raise ValueError unless every sample has one; `name` is what the data are called. Of `.txt` the index tells,
        without reading any; every `.json` is read."""
        if self.where == TXT:
            missing = np.flatnonzero(~which_have(self.dataset))
        else:
            field = self.where.removeprefix(JSON)
            missing = np.array(
                [n for n in range(self.dataset.num_samples) if not _holds(self.dataset.read_metadata(n).get(field))],
                dtype=np.int64,
            )
        if not len(missing):
            return
        key, shard = self.dataset.key(int(missing[0]))
        every = len(missing) == self.dataset.num_samples
        raise ValueError(
            f"{'all' if every else len(missing)} of {self.dataset.num_samples} samples of {name} have no caption "
            f"({self.told}), such as {shown(key)} in {shown(str(shard))}; {ADVICE}"
        )


ADVICE = (
    "put a .txt of its name beside each image and pack them, or name the field of the .json that has them, "
    "method.text=json:FIELD"
)


def which_have(dataset: Dataset) -> np.ndarray:
    """(num_samples,) bool: the samples with a `KEY.txt`.

    Raises:
        ValueError: The index of the shards is of a version that did not look for them.
    """
    if not dataset.index.knows_texts:
        raise ValueError(
            f"the index of {shown(str(dataset.shards[0]))} was written by an earlier version, which did not look for "
            "captions; remove the .index files beside the shards and publish new ones, and they are found"
        )
    if not dataset.index.has("text"):
        return np.zeros(dataset.num_samples, dtype=bool)
    return np.asarray(dataset.index.text_sizes) > 0


def _holds(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and text.strip() for text in values)
