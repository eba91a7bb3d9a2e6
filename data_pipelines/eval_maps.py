"""Masks and depths cropped as `eval_loader.center_crops` crops their images: what dense probes are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data_pipelines.cores import cores_per_process
from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.eval_loader import geometry
from data_pipelines.images.maps import BadMapError, ignored_level, nearest_places, upright_size

IGNORED = -1  # of a mask: not to be judged


class CenterMaps:
    """The maps of some samples of a data set as the centre crops of `size` px show them; read when they are asked for.

    Each pixel of a crop has the value of the one pixel of the map in whose area its middle lies, by the very geometry
    of `center_crops`: no value is mixed with another.

    Args:
        dataset: Where to read.
        samples: (n,) their numbers, in order.
        size: Side of the crops in px.
        kind: "mask": (b, size, size) int64 with `IGNORED` for the highest level (255, or 65535 of 16 bits); "depth":
            float32 with NaN where it is unknown.
        resize: As of `center_crops`.
        threads: Default: one a core.

    `rows` (m,) int64 are the places, ascending, of those samples that have one; no others can be asked for.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: Sequence[int] | np.ndarray | Tensor,
        size: int,
        *,
        kind: str = "mask",
        resize: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.dataset, self.size, self.kind, self.resize = dataset, size, kind, resize
        self.samples = np.asarray(samples, dtype=np.int64)
        self._threads = threads or cores_per_process()
        self.rows = torch.from_numpy(np.flatnonzero(maps.which_have(dataset, kind)[self.samples]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Tensor:
        """(b, size, size) of the samples in these places of `samples`.

        Raises BadMapError for one that is not there, damaged, or of another size than its image, with its name.
        """
        chosen = self.samples[rows if isinstance(rows, slice) else np.asarray(rows)].tolist()
        if len(chosen) <= 1 or self._threads == 1:
            found = [self._read(sample) for sample in chosen]
        else:
            with ThreadPoolExecutor(self._threads, "eval-maps") as pool:
                found = list(pool.map(self._read, chosen))
        empty = np.zeros((0, self.size, self.size), np.int64 if self.kind == "mask" else np.float32)
        return torch.from_numpy(np.stack(found) if found else empty)

    def _read(self, sample: int) -> np.ndarray:
        size = upright_size(self.dataset.read(sample).image)
        values = maps.read(self.dataset, sample, self.kind, size)
        if values is None:
            key, shard = self.dataset.key(sample)
            raise BadMapError(
                f"sample {key} of {shard} has no {self.kind}; pack images with theirs (`selfsight pack IMAGES SHARDS "
                f"--{self.kind}s FOLDER`), or leave such images out"
            )
        crop = cropped_map(values, self.size, self.resize)
        if self.kind != "mask":
            return crop
        return np.where(crop == ignored_level(values), IGNORED, crop.astype(np.int64))


def cropped_map(values: np.ndarray, size: int, resize: int | None = None) -> np.ndarray:
    """(size, size) of a map (h, w): by the geometry of `center_crops`, each pixel the nearest of the map's."""
    height, width = values.shape
    (new_width, new_height), (left, top) = geometry(width, height, size, resize)
    rows = nearest_places(height, new_height)[top : top + size]
    columns = nearest_places(width, new_width)[left : left + size]
    return values[rows[:, None], columns]
