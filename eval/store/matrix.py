"""Features as probes read them: mapped from the disk, so that memory does not grow with their number."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.files import parse_json, write_json
from data_pipelines.remote.cache_folder import gigabytes
from eval.base import FeatureSet
from eval.store.layout import Layout
from eval.store.mapped import MappedTexts, mapped
from eval.store.native_tokens import GRIDS, StoredNativeTokens

COMPLETE = "complete.json"
_MOST_COPIED = 1 << 30  # bytes of chosen rows that are held in memory; more go to a file without a name


class StoredTokens:
    """Patch tokens of n images, read row by row; see `eval.base.Tokens`."""

    def __init__(self, values: np.ndarray, grid: tuple[int, int], rows: Tensor | None = None) -> None:
        """`values` (m, t, d), of which the `rows` (n,) are meant; default: all."""
        self._values, self._rows, self.grid, self.dim = torch.from_numpy(values), rows, grid, int(values.shape[2])

    def __len__(self) -> int:
        return len(self._values) if self._rows is None else len(self._rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(b, t, d) float32 of the images `rows` (b,)."""
        rows = rows.cpu()
        return self._values.index_select(0, rows if self._rows is None else self._rows[rows]).float()


class MappedFeatures:
    """A folder of arrays with a row an image: `features` (n, dim), `samples`, `labels` and `digests` (n,), and perhaps
    `tokens` (n, t, d), or those of images at their own shape (`StoredNativeTokens`), `keys` and `metadata`.

    Raises OSError or ValueError where it is not there, not whole, or of another `digest` (of a store's identity).
    """

    def __init__(self, folder: Path, layout: Layout, digest: str) -> None:
        self.folder, self.layout = folder, layout
        complete = parse_json((folder / COMPLETE).read_text(encoding="utf-8"))
        arrays = {name: mapped(folder / f"{name}.npy") for name in ("features", "samples", "labels", "digests")}
        self.features, self.samples = arrays["features"], arrays["samples"]
        self.labels, self.digests = arrays["labels"], arrays["digests"]
        self.tokens: np.ndarray | StoredNativeTokens | None = None
        if complete["tokens"]:
            native = (folder / GRIDS).is_file()
            self.tokens = StoredNativeTokens(folder) if native else mapped(folder / "tokens.npy")
        rows = {len(values) for values in (*arrays.values(), *(() if self.tokens is None else (self.tokens,)))}
        if complete["store"] != digest or rows != {complete["rows"]} or self.features.shape[1] != layout.dim:
            raise ValueError(f"{folder} holds arrays of {sorted(rows)} rows, not what its {COMPLETE} says")
        has_texts = (folder / "keys.npy").is_file()
        self.keys: Sequence[str] = MappedTexts(folder, "keys") if has_texts else ()

    def __len__(self) -> int:
        return len(self.samples)

    def metadata(self, row: int) -> dict:
        """What the `.json` of an image said; empty where it had none."""
        text = MappedTexts(self.folder, "metadata")[row]
        return json.loads(text) if text else {}

    def feature_set(self, samples: np.ndarray | None = None) -> FeatureSet:
        """Of all images, or of those with these ascending numbers; what could not be read is not among them.

        The inputs are views of one mapped matrix, float32 or float16 as kept. Of a choice of rows with gaps, they are a
        copy: in memory up to 1 GiB, beyond that in a file that goes when they do.
        """
        rows = np.arange(len(self)) if samples is None else np.flatnonzero(np.isin(self.samples, samples))
        whole = len(rows) == len(self)
        consecutive = len(rows) > 0 and int(rows[-1]) - int(rows[0]) + 1 == len(rows)
        if consecutive:
            matrix = self.features[int(rows[0]) : int(rows[-1]) + 1]
        else:
            matrix = _copied(self.features, rows, self.folder)
        chosen = torch.from_numpy(rows)
        tokens: StoredTokens | StoredNativeTokens | None = None
        if isinstance(self.tokens, StoredNativeTokens):
            tokens = self.tokens.of(rows)
        elif self.tokens is not None:
            assert self.layout.grid is not None
            tokens = StoredTokens(self.tokens, self.layout.grid, None if whole else chosen)
        return FeatureSet(
            self.layout.views(torch.from_numpy(matrix)),
            self.layout.pooled_as,
            labels=torch.from_numpy(self.labels[rows]),
            ids=torch.from_numpy(self.samples[rows]),
            digests=torch.from_numpy(self.digests[rows]),
            keys=self.keys.of(rows) if isinstance(self.keys, MappedTexts) else (),
            tokens=tokens,
        )


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raise ValueError where the disk of `folder` has no room for so many bytes."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ValueError(
            f"{what} would take {gigabytes(num_bytes)} ({num_bytes:,} bytes), and the disk of {folder} has "
            f"{gigabytes(free)} ({free:,} bytes) free; make room, or choose another place"
        )


def write_complete(folder: Path, digest: str, rows: int, tokens: bool) -> None:
    """Say that a folder of arrays is whole."""
    write_json(folder / COMPLETE, {"store": digest, "rows": rows, "tokens": tokens})


def _copied(matrix: np.ndarray, rows: np.ndarray, folder: Path) -> np.ndarray:
    """The given rows (n,) of a mapped matrix, in memory or, where that is much, in a file without a name."""
    shape = (len(rows), matrix.shape[1])
    if shape[0] * shape[1] * matrix.itemsize <= _MOST_COPIED:
        return np.ascontiguousarray(matrix[rows])
    place = folder if os.access(folder, os.W_OK) else None  # a store that only others may write to
    with tempfile.TemporaryFile(dir=place) as file:
        copy = np.memmap(file, matrix.dtype, "w+", shape=shape)
    for start in range(0, len(rows), 8192):
        copy[start : start + 8192] = matrix[rows[start : start + 8192]]
    return copy
