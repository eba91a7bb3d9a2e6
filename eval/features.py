"""One pass over a data set: labelled images in, frozen features out. Every probe reads the same features."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_pipelines.shards.index import NO_LABEL
from eval.base import Change, FeatureSet

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from pretrain.encoders import Encoder, Features


@torch.no_grad()
def extract(
    encoder: Encoder,
    dataset: Dataset,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int = 3,
    bits: int = 8,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    last_blocks: int = 4,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
    samples: np.ndarray | None = None,
    change: Change | None = None,
) -> FeatureSet:
    """Features of the centre crops of a data set, on the CPU, in the data set's order.

    Squares of `size` px are normalised on the device with `mean` and `std` of pixels in 0 .. 1. Of the
    `last_blocks` those count whose width is that of the output: in a pyramid that is the last stage. Of `samples` (n,),
    by default those that have a class; a data set without is refused with ValueError. Rank r of w reads its share only.
    `change`: what is done to the crops before they are normalised.
    """
    encoder = encoder.eval().to(device)
    shift = rearrange(torch.tensor(mean, device=device), "c -> 1 c 1 1")
    scale = rearrange(torch.tensor(std, device=device), "c -> 1 c 1 1")
    num_blocks = min(last_blocks, len(encoder.blocks()))
    earlier = tuple(range(-num_blocks, -1))
    samples = labelled(dataset) if samples is None else samples
    rows = _Rows(len(samples))
    kind = (channels, bits)
    batches = _crops(dataset, samples, size, batch_size, kind, progress, "features", rank, world_size, change)
    names: dict[str, slice] = {}
    pooled_as = ""
    for images, labels, ids, digests in batches:
        # uint8 or uint16 until here: a quarter of the transfer
        pixels = images.to(device).float().div_(torch.iinfo(images.dtype).max)
        features = encoder(pixels.sub_(shift).div_(scale), layers=earlier)
        if not names:
            names, pooled_as = layout(features)
        rows.add(columns_of(features, "pooled" in names), labels, ids, digests)
    return FeatureSet(
        {name: rows.matrix[: rows.filled, columns] for name, columns in names.items()},
        pooled_as,
        *rows.columns(),
    )


@torch.no_grad()
def pixels(
    dataset: Dataset,
    size: int,
    *,
    channels: int = 3,
    bits: int = 8,
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
    kind = (channels, bits)
    for images, labels, ids, digests in _crops(
        dataset, samples, size, batch_size, kind, progress, "pixels", change=change
    ):
        flat = rearrange(images, "b c h w -> b (c h w)").float()
        rows.add(flat.div_(torch.iinfo(images.dtype).max), labels, ids, digests)
    return FeatureSet({"pixels": rows.matrix[: rows.filled]}, "pixels", *rows.columns())


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
        self.beside: list[tuple[Tensor, ...]] = []
        self.matrix = torch.empty(0)

    def add(self, values: Tensor, *beside: Tensor) -> None:
        if not self.filled:
            self.matrix = torch.empty(self.capacity, values.shape[1])
        self.matrix[self.filled : self.filled + len(values)] = values
        self.filled += len(values)
        self.beside.append(beside)

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """What stands beside the rows: labels, ids and digests, (n,) int64 each."""
        labels, ids, digests = (torch.cat(parts) for parts in zip(*self.beside, strict=True))
        return labels, ids, digests


def _last_blocks(features: Features) -> list[Features]:
    """The blocks asked for that are as wide as the output, then the output itself."""
    width = features.tokens.shape[-1]
    return [block for block in features.layers if block.tokens.shape[-1] == width] + [features]


def _summary(features: Features) -> Tensor:
    """(b, d) the class token, or the mean of the patch tokens where there is none."""
    return features.tokens.mean(dim=1) if features.prefix_tokens is None else features.prefix_tokens[:, 0]


def layout(features: Features) -> tuple[dict[str, slice], str]:
    """Which columns of `columns_of` each input takes, and which of them is the pooled feature."""
    width, count = features.tokens.shape[-1], len(_last_blocks(features))
    end, last = count * width, (count - 1) * width
    if features.prefix_tokens is None:
        names, blocks = {"mean": slice(last, end)}, {f"mean of last {count}": slice(0, end)}
    else:
        names = {"class": slice(last, end), "mean": slice(end, end + width), "class + mean": slice(last, end + width)}
        blocks = {f"class of last {count}": slice(0, end), f"class of last {count} + mean": slice(0, end + width)}
        end += width
    names |= blocks if count > 1 else {}
    for name, summary in (("class", features.prefix_tokens), ("mean", features.tokens)):
        if name in names and summary is not None:
            value = summary[:, 0] if name == "class" else summary.mean(dim=1)
            if value.shape == features.pooled.shape and torch.allclose(value, features.pooled, rtol=1e-3, atol=1e-4):
                return names, name
    return names | {"pooled": slice(end, end + features.pooled.shape[1])}, "pooled"


def columns_of(features: Features, with_pooled: bool) -> Tensor:
    parts = [_summary(block) for block in _last_blocks(features)]
    if features.prefix_tokens is not None:
        parts.append(features.tokens.mean(dim=1))
    if with_pooled:
        parts.append(features.pooled)
    return torch.cat(parts, dim=1).float().cpu()


def labelled(dataset: Dataset) -> np.ndarray:
    """(n,) the numbers of the samples that have a class; ValueError where none has."""
    found = np.flatnonzero(dataset.labels != NO_LABEL)
    if not len(found):
        raise ValueError(
            f"none of the {dataset.num_samples} samples has a label, and a probe needs labels; "
            "pack a folder with one sub-folder a class, or name a labelled data set"
        )
    return found


def _crops(
    dataset: Dataset,
    samples: np.ndarray,
    size: int,
    batch_size: int,
    kind: tuple[int, int],
    progress: bool,
    what: str,
    rank: int = 0,
    world_size: int = 1,
    change: Change | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches (images, labels, ids, digests) of these samples. `kind`: channels and bits."""
    from data_pipelines.eval_loader import center_crops

    seen = 0
    channels, bits = kind
    with _progress(what, len(samples) // world_size, progress) as advance:
        for images, labels, ids in center_crops(
            dataset, size, batch_size=batch_size, rank=rank, world_size=world_size, channels=channels, bits=bits,
            samples=None if len(samples) == dataset.num_samples else samples.tolist(),
        ):  # fmt: skip
            seen += len(labels)
            digests = _digests(images)
            yield images if change is None else change(images, ids), labels.long(), ids.long(), digests
            advance(len(labels))
    if not seen:
        raise ValueError(
            f"none of the {len(samples)} samples can be read as an image of {channels} channels, as the encoder "
            f"takes them; `selfsight verify {dataset.shards[0].parent}` says what they are"
        )


def _digests(images: Tensor) -> Tensor:
    """(b,) int64, of each image's pixels; a fraction of the time of decoding them."""
    found = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images.numpy())
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in found])


class _Advance(Protocol):
    def __call__(self, images: int) -> None: ...


@contextmanager
def _progress(what: str, total: int, shown: bool) -> Iterator[_Advance]:
    """A bar with images per second and the time left, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(what, total=total, rate="")
        start, seen = time.monotonic(), 0

        def advance(images: int) -> None:
            nonlocal seen
            seen += images
            bar.update(task, completed=seen, rate=f"{seen / max(time.monotonic() - start, 1e-9):,.0f} images/s")

        yield advance
