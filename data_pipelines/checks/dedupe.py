"""Exact and near duplicates within and between the splits of a data set, and which of them to leave out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.checks.fingerprint import (
    HASH_BITS,
    MIRROR_BITS,
    Fingerprints,
    correlations,
    take_fingerprints,
)
from data_pipelines.checks.neighbours import Pairs, hamming_pairs
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.files import atomic_write

#: Splits that others are measured on: a duplicate leaves the split that is further down.
HELD_OUT = ("test", "val")
KINDS = ("exact", "pixels", "near")
DEFAULT_RADIUS = 16
_MAX_RADIUS = 32  # a quarter of the bits; unrelated images begin to meet, and the search takes hours
_LEAST_CORRELATION = 0.8
_MAX_PAIRS = 100_000_000

#: From the fingerprints of all samples and the rows in question to pairs of rows that look alike.
FindNear = Callable[[Fingerprints, np.ndarray], Iterable[Pairs]]


@dataclass(frozen=True)
class Duplicate:
    """One sample to leave out, and the one it duplicates; both are numbered through all splits."""

    number: int
    of: int
    kind: str  # of KINDS
    distance: float


class Splits:
    """Several data sets numbered through, the held-out ones first."""

    def __init__(self, datasets: Mapping[str, Dataset]) -> None:
        self.names = sorted(datasets, key=lambda name: HELD_OUT.index(name) if name in HELD_OUT else len(HELD_OUT))
        self.datasets = [datasets[name] for name in self.names]
        self.ends = np.cumsum([dataset.num_samples for dataset in self.datasets])
        self.num_samples = int(self.ends[-1])

    def parts(self) -> Iterator[tuple[Dataset, slice]]:
        """Every data set with the numbers of its samples."""
        for dataset, end in zip(self.datasets, self.ends.tolist(), strict=True):
            yield dataset, slice(end - dataset.num_samples, end)

    def split_of(self, numbers: np.ndarray | int) -> Any:
        """Which of `names` a sample belongs to, as a position."""
        return np.searchsorted(self.ends, numbers, side="right")

    def locate(self, number: int) -> tuple[str, Dataset, int]:
        """The split's name, its data set, and the sample in it."""
        split = int(self.split_of(number))
        dataset = self.datasets[split]
        return self.names[split], dataset, number - int(self.ends[split]) + dataset.num_samples

    def describe(self, number: int) -> dict[str, str]:
        """The sample in words of JSON."""
        name, dataset, sample = self.locate(number)
        key, shard = dataset.key(sample)
        return {"split": name, "shard": str(shard), "key": key}


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    splits: Splits
    duplicates: list[Duplicate]  # by number
    num_unreadable: int

    def counts(self) -> dict[str, Counter[str]]:
        """How many to leave out, by where the two lie ("within val", "train, of val") and by kind."""
        counts: dict[str, Counter[str]] = {}
        for duplicate in self.duplicates:
            ours, theirs = (self.splits.locate(number)[0] for number in (duplicate.number, duplicate.of))
            where = f"within {ours}" if ours == theirs else f"{ours}, of {theirs}"
            counts.setdefault(where, Counter())[duplicate.kind] += 1
        return counts

    def write(self, path: Path) -> None:
        """One line of JSON a sample to leave out, for `selfsight pack --leave-out`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            for duplicate in self.duplicates:
                line = {
                    **self.splits.describe(duplicate.number),
                    "kind": duplicate.kind,
                    "distance": round(duplicate.distance, 6),
                    "duplicate_of": self.splits.describe(duplicate.of),
                }
                file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")


def dedupe(
    datasets: Mapping[str, Dataset],
    find_near: FindNear,
    *,
    threads: int | None = None,
    progress: bool = True,
) -> Found:
    """Find what duplicates what, and decide what stays.

    Of images with the same decoded pixels one stays. Then, from the best image to the worst, each stays unless it is
    near one that stays. So whatever is left out is near the very sample it is said to duplicate: a chain of small
    changes, such as a film's frames, loses the links between and not all but one. The better of two is the one in
    `test`, then in `val`, then the one with more pixels, then the first. A training image near one that is held out is
    left out whether or not that one stays.

    Args:
        datasets: By the name of the split.
        find_near: Such as `NearByHash`. It is asked about one of each set of equal images.
        threads: That decode; default: see `loader.default_threads`.
        progress: Show a bar.

    Raises:
        ValueError: More than 100 million near pairs; the threshold calls unlike images alike.
    """
    splits = Splits(datasets)
    prints = Fingerprints.empty(splits.num_samples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("reading", total=splits.num_samples)
        for dataset, rows in splits.parts():
            take_fingerprints(dataset, prints.part(rows), threads=threads, advance=lambda n: bar.advance(task, n))
        readable = np.flatnonzero(prints.readable)
        split = splits.split_of(np.arange(splits.num_samples))
        order = readable[np.lexsort((readable, -prints.num_pixels[readable], split[readable]))]
        leaders = _same_pixels(prints, order)
        rows = order[leaders[order] == order]
        task = bar.add_task("comparing", total=None)
        distances = _leave_out(leaders, order, split, _collected(find_near(prints, np.sort(rows))))
        bar.update(task, total=len(rows), completed=len(rows))
    found = []
    for number in readable[leaders[readable] != readable].tolist():
        of = int(leaders[number])
        if (prints.byte_digests[number] == prints.byte_digests[of]).all():
            kind = "exact"
        elif (prints.pixel_digests[number] == prints.pixel_digests[of]).all():
            kind = "pixels"
        else:
            kind = "near"
        found.append(Duplicate(number, of, kind, float(distances[number])))
    return Found(splits, found, splits.num_samples - len(readable))


def _same_pixels(prints: Fingerprints, order: np.ndarray) -> np.ndarray:
    """(n,) for every sample the first in `order` with its pixels."""
    digests = np.ascontiguousarray(prints.pixel_digests[order]).view("V16")[:, 0]
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    leaders = np.arange(len(prints.readable))
    leaders[order] = order[first[group.ravel()]]
    return leaders


def _collected(parts: Iterable[Pairs]) -> Pairs:
    kept, total = [Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))], 0
    for part in parts:
        kept.append(part)
        total += len(part.first)
        if total > _MAX_PAIRS:
            raise ValueError(
                f"more than {_MAX_PAIRS:,} pairs of images are near duplicates by this threshold; make it stricter"
            )
    return Pairs(*(np.concatenate(column) for column in zip(*kept, strict=True)))


def _leave_out(leaders: np.ndarray, order: np.ndarray, split: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Set the leaders of near duplicates; (n,) their distances to them."""
    rank = np.empty(len(leaders), dtype=np.int64)
    rank[order] = np.arange(len(order))
    swapped = rank[pairs.first] > rank[pairs.second]
    better, worse = np.where(swapped, pairs.second, pairs.first), np.where(swapped, pairs.first, pairs.second)
    by_rank = np.lexsort((rank[better], pairs.distance, rank[worse]))
    rows = zip(worse[by_rank].tolist(), better[by_rank].tolist(), pairs.distance[by_rank].tolist(), strict=True)
    copies = np.flatnonzero(leaders != np.arange(len(leaders)))
    distances = np.zeros(len(leaders), dtype=np.float32)
    for ours, group in groupby(rows, key=lambda row: row[0]):
        near = [(other, distance) for _, other, distance in group]
        staying = [entry for entry in near if leaders[entry[0]] == entry[0]]
        elsewhere = [entry for entry in near if split[entry[0]] != split[ours]]
        if staying or elsewhere:
            leaders[ours], distances[ours] = (staying or elsewhere)[0]
    distances[copies] = distances[leaders[copies]]  # what has the pixels of one left out is near what that one is near
    leaders[copies] = leaders[leaders[copies]]
    return distances


@dataclass(frozen=True)
class NearByHash:
    """Pairs by their perceptual hash: at most `radius` bits of 128 apart, and thumbnails that correlate.

    Images without texture have no such hash: of them only equal ones are duplicates.
    """

    radius: int = DEFAULT_RADIUS
    mirrored: bool = False  # also find mirror images
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.radius <= _MAX_RADIUS:
            raise ValueError(
                f"the threshold is {self.radius}; it is the largest number of bits in which the hashes of duplicates "
                f"differ, 0 .. {_MAX_RADIUS} of {HASH_BITS} (default {DEFAULT_RADIUS})"
            )

    def __call__(self, prints: Fingerprints, rows: np.ndarray) -> Iterator[Pairs]:
        rows = rows[prints.textured[rows]]
        hashes = prints.hashes[rows]
        for mirrored in (False, True) if self.mirrored else (False,):
            turned = MIRROR_BITS if mirrored else None
            for pairs in hamming_pairs(hashes, self.radius, turned=turned, threads=self.threads):
                first, second = rows[pairs.first], rows[pairs.second]
                likeness = correlations(prints.thumbnails[first], prints.thumbnails[second], mirrored)
                alike = likeness >= _LEAST_CORRELATION
                yield Pairs(first[alike], second[alike], pairs.distance[alike])
