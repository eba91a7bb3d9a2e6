"""What a folder of images, a list of them or a data set of shards holds: how many, how large, of which channels and
depth. For choosing a preset before anything is packed; imports no torch."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.datasets.statistics import draw_samples
from data_pipelines.images.decode import DAMAGE, BadSampleError, decode, look, reason_of
from data_pipelines.images.depth import bits_used
from data_pipelines.images.issues import shown
from data_pipelines.images.sample import Sample
from data_pipelines.packing.scan import scan
from data_pipelines.packing.sources.opening import open_source

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_NAMED = 5  # unreadable images


class Sides(NamedTuple):
    """Lengths in px at `QUANTILES`: smallest, quartiles, largest."""

    least: int
    low: int
    median: int
    high: int
    most: int


@dataclass(frozen=True)
class ImagesSummary:
    """What was found; sizes, channels and bits are those of a sample of the images."""

    number: int  # images in the split that a run learns from
    splits: dict[str, int]  # images by split
    classes: int | None  # None: no labels
    looked_at: int  # of the sample, could be decoded
    short_side: Sides
    long_side: Sides
    channels: dict[int, int]  # images by their number of channels, opacity left out
    bits_stored: int  # of a channel, 8 or 16: the deepest
    bits_used: int  # of those: 12 where 16-bit files hold no level above 4,095, or only multiples of 16
    largest_level: int  # of the deepest; `depth.depth_warning` tells from it what a run of fewer bits would lose
    tone_spread: float  # deviation over the images of an image's mean level, as a share of white
    formats: dict[str, int]
    unreadable: tuple[str, ...]  # names and reasons of the first few
    num_unreadable: int


def inspect_images(images: str | Path, sample: int = 200, seed: int = 0) -> ImagesSummary:
    """Look at `sample` images, drawn by `seed`, of what `selfsight pack` or a run would take.

    Args:
        images: A folder of images, a list, tars or tables, as of `open_source`; or a folder of packed shards.
        sample: Images that are decoded.
        seed: Of which.

    Raises:
        FileNotFoundError: There is no image.
        ValueError: None of the sample can be decoded, or the source is not as it should be.
    """
    if sample < 1:
        raise ValueError(f"sample is {sample}; look at 1 image or more")
    folder = Path(images).expanduser()
    if folder.is_dir() and any(folder.glob("train-*.tar")):
        return _of_shards(folder, sample, seed)
    with tempfile.TemporaryDirectory() as spool:
        source = open_source(images, Path(spool))
        try:
            catalogue = scan(source)
            splits = {name: len(members) for name, members in catalogue.splits.items()}
            members = catalogue.splits.get("train", next(iter(catalogue.splits.values())))
            chosen = members[draw_samples(seed, len(members), sample)].tolist()
            contents = zip(chosen, source.contents(chosen), strict=True)
            known = np.unique(catalogue.labels[catalogue.labels >= 0])
            looks = _Looks()
            for number, content in contents:
                path = source.listing.entry(number).path
                try:
                    image = content().image
                except (*DAMAGE, OSError) as error:
                    looks.refuse(path, reason_of(error))
                    continue
                looks.add(path, image)
            return looks.summary(len(members), splits, len(known) or None)
        finally:
            source.close()


def _of_shards(folder: Path, sample: int, seed: int) -> ImagesSummary:
    splits = Counter(shard.name.rpartition("-")[0] for shard in folder.glob("*-*.tar"))
    looks = _Looks()
    counts = {}
    for split in sorted(splits):
        with open_dataset(folder, split) as dataset:
            counts[split] = dataset.num_samples
            if split == "train":
                known = np.unique(dataset.labels[dataset.labels >= 0])
                for number in draw_samples(seed, dataset.num_samples, sample):
                    stored = dataset.read(number)
                    looks.add(f"{stored.key} of {stored.shard}", stored.image)
    return looks.summary(counts["train"], counts, len(known) or None)


class _Looks:
    """What was seen of the images so far."""

    def __init__(self) -> None:
        self._sides: list[tuple[int, int]] = []
        self._channels: Counter[int] = Counter()
        self._formats: Counter[str] = Counter()
        self._unreadable: list[str] = []
        self._levels: dict[int, int] = {}  # by depth, all levels of all pixels joined by OR
        self._largest: Counter[int] = Counter()  # by depth
        self._tones: list[float] = []

    def add(self, name: str, content: bytes) -> None:
        try:
            header = look(content)
            pixels = decode(Sample("", Path(), content, None), None, None)
        except DAMAGE as error:
            self.refuse(name, error.reason if isinstance(error, BadSampleError) else reason_of(error))
            return
        height, width, channels = pixels.shape
        self._sides.append((height, width))
        self._channels[channels] += 1
        self._formats[header.format] += 1
        depth = 8 * pixels.dtype.itemsize
        self._levels[depth] = self._levels.get(depth, 0) | int(np.bitwise_or.reduce(pixels, axis=None))
        self._largest[depth] = max(self._largest[depth], int(pixels.max()))
        self._tones.append(float(pixels.mean()) / ((1 << depth) - 1))

    def refuse(self, name: str, reason: str) -> None:
        self._unreadable.append(f"{shown(name)}: {shown(reason)}")

    def summary(self, number: int, splits: dict[str, int], classes: int | None) -> ImagesSummary:
        if not self._sides:
            raise ValueError(
                f"none of {len(self._unreadable)} images that were looked at can be read; the first, "
                f"{self._unreadable[0]}"
            )
        deepest = max(self._levels)
        return ImagesSummary(
            number=number,
            splits=splits,
            classes=classes,
            looked_at=len(self._sides),
            short_side=_quantiles([min(sides) for sides in self._sides]),
            long_side=_quantiles([max(sides) for sides in self._sides]),
            channels=dict(sorted(self._channels.items())),
            bits_stored=deepest,
            bits_used=bits_used(self._levels[deepest]),
            largest_level=self._largest[deepest],
            tone_spread=float(np.std(self._tones)),
            formats=dict(sorted(self._formats.items())),
            unreadable=tuple(self._unreadable[:_MAX_NAMED]),
            num_unreadable=len(self._unreadable),
        )


def _quantiles(lengths: Sequence[int]) -> Sides:
    return Sides(*np.quantile(lengths, QUANTILES, method="nearest").astype(int).tolist())
