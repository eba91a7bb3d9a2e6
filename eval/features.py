"""One pass over a data set: labelled images in, frozen features out, in memory. Every probe reads the same features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data_pipelines.shards.index import NO_LABEL
from eval.base import Change, FeatureSet
from eval.store.encoding import Batch, Crops, FrozenEncoder, digests_of, unreadable
from eval.store.precision import Arithmetic
from eval.store.progress import counting

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from pretrain.encoders import Encoder


def extract(
    encoder: Encoder,
    dataset: Dataset,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int = 3,
    bits: int = 8,
    frames: int = 1,
    frame_stride: int | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    last_blocks: int = 4,
    arithmetic: Arithmetic = "fp32",
    progress: bool = True,
    samples: np.ndarray | None = None,
    change: Change | None = None,
    native: bool = False,
) -> FeatureSet:
    """Features of the centre crops of a data set, in memory, in the data set's order.

    Squares of `size` px are normalised on the device with `mean` and `std` of pixels in 0 .. 1. Of the
    `last_blocks` those count whose width is that of the output: in a pyramid that is the last stage. Of `samples` (n,),
    by default those that have a class; a data set without is refused with ValueError, and one without an image that can
    be read. `change`: what is done to the crops before they are normalised.
    `native`: see `Crops`.
    """
    crops = Crops(size, channels, bits, mean, std, frames, frame_stride, native)
    frozen = FrozenEncoder(encoder, crops, device=device, arithmetic=arithmetic, last_blocks=last_blocks)
    samples = labelled(dataset) if samples is None else samples
    rows = _Rows(len(samples))
    with counting("features", len(samples), progress) as advance:
        for batch in frozen.batches(dataset, samples, batch_size, change):
            rows.add(batch)
            advance(len(batch.rows))
    return rows.features(dataset, channels, frozen.layout.pooled_as, frozen.layout.inputs)


def pixels(
    dataset: Dataset,
    size: int,
    *,
    channels: int = 3,
    bits: int = 8,
    frames: int = 1,
    frame_stride: int | None = None,
    batch_size: int = 256,
    progress: bool = True,
    samples: np.ndarray | None = None,
    change: Change | None = None,
) -> FeatureSet:
    """Raw pixels of centre crops of `size` px, flat and in 0 .. 1, as the input `pixels`: the floor of every probe.

    Subtract train's mean from train and val alike (`centred`) before comparing them by cosine. `samples`, `change`: as
    of `extract`.
    """
    samples = labelled(dataset) if samples is None else samples
    rows = _Rows(len(samples))
    kind: dict[str, Any] = {"channels": channels, "bits": bits}
    kind |= {"frames": frames, "frame_stride": frame_stride} if frames > 1 else {}
    with counting("pixels", len(samples), progress) as advance:
        for batch in _pixel_batches(dataset, samples, size, kind, batch_size, change):
            rows.add(batch)
            advance(len(batch.rows))
    return rows.features(dataset, channels, "pixels", {"pixels": (0, frames * channels * size**2)})


def _pixel_batches(
    dataset: Dataset, samples: np.ndarray, size: int, kind: dict[str, Any], batch_size: int, change: Change | None
) -> Iterator[Batch]:
    """`kind`: channels, bits and frames, as `center_crops` takes them."""
    from data_pipelines.eval_loader import center_crops

    for images, labels, ids in center_crops(dataset, size, batch_size=batch_size, samples=samples, **kind):
        digests = digests_of(images.numpy())
        images = images if change is None else change(images, ids)
        flat = rearrange(images, "b c h w -> b (c h w)").float().div_(torch.iinfo(images.dtype).max)
        yield Batch(flat.numpy(), None, labels.numpy(), ids.numpy(), digests)


def centred(train: FeatureSet, val: FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    """Both sets less the mean of `train`, input by input."""
    means = {name: features.mean(dim=0) for name, features in train.inputs.items()}

    def subtract(features: FeatureSet) -> FeatureSet:
        inputs = {name: values - means[name] for name, values in features.inputs.items()}
        return replace(features, inputs=inputs)

    return subtract(train), subtract(val)


class Keys(Sequence[str]):
    """The names of the samples of these `ids` (n,), looked up when they are asked for: a data set may have millions."""

    def __init__(self, dataset: Dataset, ids: Tensor) -> None:
        self._dataset, self._ids = dataset, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Keys: ...
    def __getitem__(self, place: int | slice) -> str | Keys:
        if isinstance(place, slice):
            return Keys(self._dataset, self._ids[place])
        return self._dataset.key(int(self._ids[place]))[0]


class _Rows:
    """A matrix that is filled row by row, allocated once when its width is known."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled = capacity, 0
        self.batches: list[Batch] = []
        self.matrix = torch.empty(0)

    def add(self, batch: Batch) -> None:
        values = torch.from_numpy(batch.rows)
        if not self.filled:
            self.matrix = torch.empty(self.capacity, values.shape[1])
        self.matrix[self.filled : self.filled + len(values)] = values
        self.filled += len(values)
        self.batches.append(batch._replace(rows=values[:0].numpy()))

    def features(
        self, dataset: Dataset, channels: int, pooled_as: str, inputs: dict[str, tuple[int, int]]
    ) -> FeatureSet:
        if not self.filled:
            raise ValueError(unreadable(dataset, channels, self.capacity))
        matrix = self.matrix[: self.filled]
        labels, ids, digests = (
            torch.from_numpy(np.concatenate([getattr(batch, name) for batch in self.batches]))
            for name in ("labels", "samples", "digests")
        )
        views = {name: matrix[:, start:stop] for name, (start, stop) in inputs.items()}
        return FeatureSet(views, pooled_as, labels, ids, digests)


def labelled(dataset: Dataset) -> np.ndarray:
    """(n,) int64 numbers of the samples that have a class; raises ValueError where none has."""
    samples = np.flatnonzero(dataset.labels != NO_LABEL)
    if not len(samples):
        raise ValueError(
            f"none of the {dataset.num_samples} samples has a label, and a probe needs labels; "
            "pack a folder with one sub-folder a class, or name a labelled data set"
        )
    return samples
