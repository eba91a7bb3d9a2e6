"""The account of samples that cannot be decoded: counted and named; beyond a share the run stops."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from threading import Lock

from data_pipelines.images.decode import BadSampleError
from data_pipelines.images.issues import CASES, shown
from data_pipelines.images.tolerance import MAX_BAD_SHARE, too_many

NUM_SHOWN = 5  # in the error that ends a run
_MAX_NAMED = 10_000  # of a data set on one rank: further ones are only counted, so that memory stays bounded
_log = logging.getLogger(__name__)


class TooManyBadSamplesError(ValueError):
    """More samples could not be decoded than the run permits."""


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


class BadSampleAccount:
    """Of one data set, for any number of threads.

    Args:
        num_samples: Of the data set.
        max_bad_share: Bad reads beyond this share of all stop the run, see `too_many`.
        log: Where bad samples are written down.
    """

    def __init__(self, num_samples: int, max_bad_share: float = MAX_BAD_SHARE, log: BadSampleLog | None = None) -> None:
        self.num_samples, self.max_bad_share, self.log = num_samples, max_bad_share, log
        self.num_reads = 0
        self.num_bad = 0
        self._noted: set[str] = set()  # of `CASES`, so that each is told once
        self._met: set[int] = set()  # samples, so that each is told once
        self._first: list[str] = []  # what was told of the first few
        self._lock = Lock()

    def count_good(self, count: int = 1) -> None:
        """So many samples were read and decoded."""
        with self._lock:
            self.num_reads += count

    def count_bad(self, error: BadSampleError) -> None:
        """A sample was read and could not be decoded; raises TooManyBadSamplesError beyond the permitted share."""
        with self._lock:
            self.num_reads += 1
            self.num_bad += 1
            num_bad, num_reads, first, num_met = self.num_bad, self.num_reads, [*self._first], len(self._met)
        if too_many(num_bad, num_reads, self.num_samples, self.max_bad_share):
            named = list(dict.fromkeys([*first, str(error)]))
            more = [f"and {num_met - len(first)} more"] if num_met > len(first) else []
            raise TooManyBadSamplesError(
                f"{num_bad} of {num_reads} samples read cannot be decoded, more than the permitted share of "
                f"{self.max_bad_share:g} (data.max_bad_share):\n  "
                + "\n  ".join(named + more)
                + f"\nList all with `selfsight verify {error.shard.parent}`, then pack the data again or permit more."
            )

    def note(self, cases: Collection[str], where: str) -> None:
        """Tell once of what is used otherwise than its owner may think; `where` was the first to be met."""
        with self._lock:
            new = [case for case in cases if case not in self._noted]
            self._noted.update(new)
        for case in new:
            found, done = CASES[case].found, CASES[case].done
            _log.warning("%s: %s; %s. This is told once; `selfsight verify` counts all", where, found, done)

    def name(self, number: int, error: BadSampleError, instead: str | None) -> None:
        """Tell of bad sample `number` when it is met for the first time; `instead`: the key of what is shown."""
        with self._lock:
            if number in self._met or len(self._met) > _MAX_NAMED:
                return
            self._met.add(number)
            is_last = len(self._met) > _MAX_NAMED
            if len(self._first) < NUM_SHOWN:
                self._first.append(str(error))
        if is_last:
            _log.warning("more than %d bad samples of this data set; further ones are counted only", _MAX_NAMED)
            return
        _log.warning("%s; %s is shown instead", error, "nothing" if instead is None else shown(instead))
        if self.log is not None:
            self.log.add(error, instead)
