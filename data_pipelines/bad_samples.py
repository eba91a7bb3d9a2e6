"""What happens to samples that cannot be decoded.

Such a sample is replaced by its neighbour, counted and logged; beyond a share the run stops.
"""

from __future__ import annotations

import logging
from threading import Lock
from typing import NamedTuple

from data_pipelines.decode import BadSampleError, decode_part
from data_pipelines.index import Dataset
from data_pipelines.parts import Choose, Picture, whole

_MAX_TRIES = 16  # neighbours in a row
_MIN_READS = 1000  # a share of fewer reads means little
_NUM_NAMED = 5
_log = logging.getLogger(__name__)


class TooManyBadSamplesError(ValueError):
    """More samples could not be decoded than the run permits."""


class Decoded(NamedTuple):
    """An image and which sample it is; that is another than asked for when that one was bad."""

    sample: int
    picture: Picture
    label: int | None


class Decoder:
    """Reads and decodes the samples of a data set for many threads, under one account of the bad ones.

    Args:
        dataset: Where to read.
        channels: Of the images, as `decode` gives them.
        max_bad_share: Bad reads beyond this share of all stop the run. The share is of at least 1,000
            reads (of all samples, if they are fewer), so that one early bad sample does not.
        padded: See `decode_part`.
        bits: Of a channel, 8 or 16.
    """

    def __init__(
        self,
        dataset: Dataset,
        channels: int = 3,
        max_bad_share: float = 0.01,
        padded: bool = False,
        bits: int = 8,
    ) -> None:
        self.dataset, self.max_bad_share = dataset, max_bad_share
        self.channels, self.bits, self.padded = channels, bits, padded
        self.num_reads = 0
        self.num_bad = 0
        self._reasons: dict[int, str] = {}  # by sample, so that each is logged once
        self._lock = Lock()

    def read(self, sample: int, choose: Choose = whole) -> Decoded:
        """The sample, or the next one in number that can be decoded (after the last comes the first).

        `choose` is told the size of each image that is tried, the one returned last.

        Raises:
            TooManyBadSamplesError: Beyond the permitted share, or no good one among the next 16.
        """
        for tried in range(_MAX_TRIES):
            number = (sample + tried) % self.dataset.num_samples
            stored = self.dataset.read(number)
            try:
                picture = decode_part(stored, self.channels, choose, self.padded, self.bits)
            except BadSampleError as error:
                self._count_bad(number, error)
                continue
            with self._lock:
                self.num_reads += 1
            return Decoded(number, picture, stored.label)
        key, shard = self.dataset.key(sample)
        raise TooManyBadSamplesError(
            f"sample {key} of {shard} and the {_MAX_TRIES - 1} after it cannot be decoded; "
            f"see what is wrong with `selfsight verify {shard.parent}`"
        )

    def _count_bad(self, number: int, error: BadSampleError) -> None:
        with self._lock:
            self.num_reads += 1
            self.num_bad += 1
            first_time = number not in self._reasons
            self._reasons.setdefault(number, str(error))
            num_bad, num_reads, reasons = self.num_bad, self.num_reads, list(self._reasons.values())
        if first_time:
            _log.warning("%s; the next good sample takes its place", error)
        if num_bad > self.max_bad_share * max(num_reads, min(_MIN_READS, self.dataset.num_samples)):
            named = reasons[:_NUM_NAMED]
            if len(reasons) > _NUM_NAMED:
                named.append(f"and {len(reasons) - _NUM_NAMED} more")
            raise TooManyBadSamplesError(
                f"{num_bad} of {num_reads} samples read cannot be decoded, more than the permitted share of "
                f"{self.max_bad_share:g} (data.max_bad_share):\n  "
                + "\n  ".join(named)
                + f"\nList all with `selfsight verify {error.shard.parent}`, then pack the data again or permit more."
            )
