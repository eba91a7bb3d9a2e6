"""Masks and depths cropped as `eval_loader` crops their images: what dense probes are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data_pipelines.cores import cores_per_process
from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.eval_loader import geometry, whole_geometry
from data_pipelines.images.maps import BadMapError, ignored_level, nearest_places, upright_size

IGNORED = -1  # of a mask: not to be judged


class _Maps:
    """The maps of some samples; see `CenterMaps`."""

    def __init__(
        self, dataset: Dataset, samples: Sequence[int] | np.ndarray | Tensor, kind: str, threads: int | None
    ) -> None:
        self.dataset, self.kind = dataset, kind
        self.samples = np.asarray(samples, dtype=np.int64)
        self._threads = threads or cores_per_process()
        self.rows = torch.from_numpy(np.flatnonzero(maps.which_have(dataset, kind)[self.samples]))

    def __len__(self) -> int:
        return len(self.samples)

    def _cut(self, values: np.ndarray) -> np.ndarray:
        """A map (h, w) as the crop of its image shows it."""
        raise NotImplementedError

    def _of(self, rows: Tensor | Sequence[int] | slice) -> list[np.ndarray]:
        chosen = self.samples[rows if isinstance(rows, slice) else np.asarray(rows)].tolist()
        if len(chosen) <= 1 or self._threads == 1:
            return [self._read(sample) for sample in chosen]
        with ThreadPoolExecutor(self._threads, "eval-maps") as pool:
            return list(pool.map(self._read, chosen))

    def _read(self, sample: int) -> np.ndarray:
        size = upright_size(self.dataset.read(sample).image)
        values = maps.read(self.dataset, sample, self.kind, size)
        if values is None:
            key, shard = self.dataset.key(sample)
            raise BadMapError(
                f"sample {key} of {shard} has no {self.kind}; pack images with theirs (`selfsight pack IMAGES SHARDS "
                f"--{self.kind}s FOLDER`), or leave such images out"
            )
        crop = self._cut(values)
        if self.kind != "mask":
            return crop
        return np.where(crop == ignored_level(values), IGNORED, crop.astype(np.int64))


class CenterMaps(_Maps):
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
        super().__init__(dataset, samples, kind, threads)
        self.size, self.resize = size, resize

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Tensor:
        """(b, size, size) of the samples in these places of `samples`.

        Raises BadMapError for one that is not there, damaged, or of another size than its image, with its name.
        """
        found = self._of(rows)
        empty = np.zeros((0, self.size, self.size), np.int64 if self.kind == "mask" else np.float32)
        return torch.from_numpy(np.stack(found) if found else empty)

    def _cut(self, values: np.ndarray) -> np.ndarray:
        return cropped_map(values, self.size, self.resize)


class WholeMaps(_Maps):
    """The maps of some samples as `eval_loader.whole_images` shows these, of at most `tokens` patches of `patch` px.

    Each pixel has the value of the one pixel of the map in whose area its middle lies; see `CenterMaps`.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: Sequence[int] | np.ndarray | Tensor,
        tokens: int,
        patch: int,
        *,
        kind: str = "mask",
        threads: int | None = None,
    ) -> None:
        super().__init__(dataset, samples, kind, threads)
        self.tokens, self.patch = tokens, patch

    def images(self, rows: Tensor | Sequence[int] | slice) -> list[Tensor]:
        """(h, w) of each of the samples in these places of `samples`; raises as `CenterMaps` does."""
        return [torch.from_numpy(found) for found in self._of(rows)]

    def _cut(self, values: np.ndarray) -> np.ndarray:
        height, width = values.shape
        size, (left, top, right, bottom) = whole_geometry(height, width, self.tokens, self.patch)
        rows, columns = (
            np.clip(first + (np.arange(new) + 0.5) * (last - first) / new, 0, old - 1).astype(np.int64)
            for first, last, new, old in zip((top, left), (bottom, right), size, values.shape, strict=True)
        )
        return values[rows[:, None], columns]


def cropped_map(values: np.ndarray, size: int, resize: int | None = None) -> np.ndarray:
    """(size, size) of a map (h, w): by the geometry of `center_crops`, each pixel the nearest of the map's."""
    height, width = values.shape
    (new_width, new_height), (left, top) = geometry(width, height, size, resize)
    rows = nearest_places(height, new_height)[top : top + size]
    columns = nearest_places(width, new_width)[left : left + size]
    return values[rows[:, None], columns]
