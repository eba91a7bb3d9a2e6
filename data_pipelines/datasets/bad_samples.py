"""What happens to samples that cannot be decoded.

Such a sample is replaced by its neighbour, counted and named; beyond a share the run stops.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.decode import BadSampleError, decode_picture
from data_pipelines.images.issues import CASES, shown
from data_pipelines.images.regions import Choose, Picture, whole
from data_pipelines.images.sample import Sample
from data_pipelines.images.tolerance import (
    MAX_BAD_SHARE,
    ShardCount,
    losses_told,
    neighbours,
    too_many,
)

_NUM_SHOWN = 5  # in the error that ends a run
_MAX_NAMED = 10_000  # of a data set on one rank: further ones are only counted, so that memory stays bounded
_log = logging.getLogger(__name__)


class TooManyBadSamplesError(ValueError):
    """More samples could not be decoded than the run permits."""


class Decoded(NamedTuple):
    """An image and which sample it is; that is another than asked for when that one was bad."""

    sample: int
    picture: Picture
    label: int | None


class BadSampleLog:
    """A file of one JSON object a bad sample, for one process to append to; made with the first of them.

    Each line, with those of an earlier start of the run, is there once: `key`, `shard`, `case` (of `CASES`), `reason`
    and `instead`, the key of the sample that is shown in its place (null if there was none).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._written: set[str] | None = None

    def add(self, error: BadSampleError, instead: str | None) -> None:
        """Write a bad sample down, if it has not been yet; a disk that is full does not end a run."""
        entry = {
            "key": shown(error.key),
            "shard": str(error.shard),
            "case": error.case,
            "reason": error.reason,
            "instead": None if instead is None else shown(instead),
        }
        line = json.dumps(entry) + "\n"
        with self._lock:
            try:
                if self._written is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._written = set(self._read())
                if line not in self._written:
                    self._written.add(line)
                    with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                        file.write(line)
            except OSError as failure:
                _log.warning("%s cannot be written (%s)", self.path, failure.strerror)

    def _read(self) -> list[str]:
        """The whole lines of an earlier start; a cut last one, of a killed process, is ended."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")
        return lines


def check_losses(dataset: Dataset, max_bad_share: float) -> None:
    """Refuse a data set of which damaged shards have lost more than a share of the samples.

    Raises:
        TooManyBadSamplesError: The message names the first of those shards; see `losses_told`.
    """
    findings = dataset.index.findings
    shards = [
        ShardCount(shard, size, number in findings and findings[number].truncated)
        for number, (shard, size) in enumerate(zip(dataset.shards, dataset.shard_sizes, strict=True))
    ]
    told, first = losses_told(shards, dataset.packed, max_bad_share)
    if told:
        raise TooManyBadSamplesError(
            f"{told}. See what is wrong with `selfsight verify {getattr(first, 'parent', first)}`, then fetch or pack "
            "these shards again, or permit more"
        )


class Decoder:
    """Reads and decodes the samples of a data set for many threads, under one account of the bad ones.

    Args:
        dataset: Where to read.
        channels: Of the images, as `decode` gives them.
        max_bad_share: Bad reads beyond this share of all stop the run, see `too_many`.
        padded: See `decode_picture`.
        log: Where bad samples are written down.
        bits: Of a channel, 8 or 16.
    """

    def __init__(
        self,
        dataset: Dataset,
        channels: int = 3,
        max_bad_share: float = MAX_BAD_SHARE,
        padded: bool = False,
        log: BadSampleLog | None = None,
        bits: int = 8,
    ) -> None:
        self.dataset, self.max_bad_share = dataset, max_bad_share
        self.channels, self.bits, self.padded = channels, bits, padded
        self.log = log
        self.num_reads = 0
        self.num_bad = 0
        self._ends: list[int] = np.cumsum(dataset.shard_sizes).tolist()
        self._noted: set[str] = set()  # of `CASES`, so that each is told once
        self._met: set[int] = set()  # samples, so that each is told once
        self._first: list[str] = []  # what was told of the first few
        self._lock = Lock()

    def read(self, sample: int, choose: Choose = whole) -> Decoded:
        """The sample, or the first of its `neighbours` that can be decoded.

        `choose` is told the size of each image that is tried, the one returned last.

        Raises:
            TooManyBadSamplesError: Beyond the permitted share, or no good one among 16 neighbours.
            OSError: The file system goes on failing, or the shard changed since it was indexed.
        """
        bad: list[tuple[int, BadSampleError]] = []
        instead = None
        try:
            for number in self.neighbours(sample):
                stored = self.dataset.read(number)
                try:
                    picture = decode_picture(stored, self.channels, choose, self.padded, self.bits)
                except BadSampleError as error:
                    self.dataset.check_unchanged(number)
                    bad.append((number, error))
                    self._count_bad(error)
                    continue
                with self._lock:
                    self.num_reads += 1
                self._note(picture, stored)
                instead = stored.key
                return Decoded(number, picture, stored.label)
        finally:
            for number, reason in bad:
                self._name(number, reason, instead)
        named = [str(error) for _, error in bad]
        more = [f"and {len(bad) - _NUM_SHOWN} more"] if len(bad) > _NUM_SHOWN else []
        raise TooManyBadSamplesError(
            f"{len(bad)} samples in a row cannot be decoded:\n  "
            + "\n  ".join(named[:_NUM_SHOWN] + more)
            + f"\nSee what is wrong with `selfsight verify {bad[0][1].shard.parent}`, then pack the data again"
        )

    def neighbours(self, sample: int) -> Iterator[int]:
        """The samples that are tried in turn, see `tolerance.neighbours`."""
        return neighbours(self._ends, sample)

    def _count_bad(self, error: BadSampleError) -> None:
        with self._lock:
            self.num_reads += 1
            self.num_bad += 1
            num_bad, num_reads, first, num_met = self.num_bad, self.num_reads, [*self._first], len(self._met)
        if too_many(num_bad, num_reads, self.dataset.num_samples, self.max_bad_share):
            named = list(dict.fromkeys([*first, str(error)]))
            more = [f"and {num_met - len(first)} more"] if num_met > len(first) else []
            raise TooManyBadSamplesError(
                f"{num_bad} of {num_reads} samples read cannot be decoded, more than the permitted share of "
                f"{self.max_bad_share:g} (data.max_bad_share):\n  "
                + "\n  ".join(named + more)
                + f"\nList all with `selfsight verify {error.shard.parent}`, then pack the data again or permit more."
            )

    def _note(self, picture: Picture, stored: Sample) -> None:
        """Tell once of what is used otherwise than its owner may think."""
        if not picture.notes:
            return
        with self._lock:
            new = [case for case in picture.notes if case not in self._noted]
            self._noted.update(new)
        for case in new:
            where = f"sample {shown(stored.key)} of {stored.shard}"
            _log.warning(
                "%s: %s; %s. This is told once; `selfsight verify` counts all",
                where,
                CASES[case].found,
                CASES[case].done,
            )

    def _name(self, number: int, error: BadSampleError, instead: str | None) -> None:
        """Tell of a bad sample when it is met for the first time."""
        with self._lock:
            if number in self._met or len(self._met) > _MAX_NAMED:
                return
            self._met.add(number)
            is_last = len(self._met) > _MAX_NAMED
            if len(self._first) < _NUM_SHOWN:
                self._first.append(str(error))
        if is_last:
            _log.warning("more than %d bad samples of this data set; further ones are counted only", _MAX_NAMED)
            return
        _log.warning("%s; %s is shown instead", error, "nothing" if instead is None else shown(instead))
        if self.log is not None:
            self.log.add(error, instead)
