"""A table of features: a row an image, with its key and label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Embedding:
    """Features of n images.

    values: (n, d) float32.
    keys: (n,) str: each image's path in its folder, or its key in the shards.
    labels: (n,) int64, -1 where an image has none.
    splits: (n,) str: train, val and so on; `train` where the images name none.
    classes: names of the labels, by number; None where labels are only numbers, or there are none.
    feature: which of the encoder's outputs it is, such as `class` or `mean`.
    """

    values: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    classes: tuple[str, ...] | None
    feature: str

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        rows, width = self.values.shape
        known = len(np.unique(self.labels[self.labels >= 0]))
        return f"Embedding({rows:,} images x {width} features ({self.feature}), {known} classes)"

    def save_npz(self, path: str | Path) -> Path:
        """Write all of it as numpy's .npz, which `numpy.load(path)` reads without pickle."""
        path = Path(path)
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                values=self.values,
                keys=self.keys,
                labels=self.labels,
                splits=self.splits,
                classes=np.array(self.classes or (), dtype=str),
                feature=np.array(self.feature),
            )
        return path

    def to_parquet(self, path: str | Path) -> Path:
        """Write a row an image: key, label, class, split, and `feature`, a list of d numbers.

        Raises ImportError where pyarrow is not installed.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ImportError("to_parquet needs pyarrow: pip install pyarrow, or take save_npz") from None
        flat = pa.array(self.values.reshape(-1), pa.float32())
        columns = {
            "key": pa.array(self.keys.tolist(), pa.string()),
            "label": pa.array(self.labels, pa.int64(), mask=self.labels < 0),
            "split": pa.array(self.splits.tolist(), pa.string()),
            "feature": pa.FixedSizeListArray.from_arrays(flat, self.values.shape[1]),
        }
        if self.classes is not None:
            names = [self.classes[label] if 0 <= label < len(self.classes) else None for label in self.labels]
            columns["class"] = pa.array(names, pa.string())
        pq.write_table(pa.table(columns), path)
        return Path(path)
