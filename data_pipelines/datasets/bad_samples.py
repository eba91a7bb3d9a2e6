"""What happens to samples that cannot be decoded: each is replaced by its neighbour, and told to the account."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines.datasets.account import NUM_SHOWN, BadSampleAccount, BadSampleLog, TooManyBadSamplesError
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.decode import BadSampleError, decode_picture
from data_pipelines.images.issues import shown
from data_pipelines.images.regions import Choose, Picture, whole
from data_pipelines.images.stacks import ChooseFrames, decode_stack
from data_pipelines.images.tolerance import MAX_BAD_SHARE, ShardCount, losses_told, neighbours

__all__ = ["BadSampleAccount", "BadSampleLog", "Decoded", "Decoder", "TooManyBadSamplesError", "check_losses"]


class Decoded(NamedTuple):
    """An image, or frames of a stack, and which sample it is: another than asked for when that one was bad."""

    sample: int
    picture: Picture  # of a stack the first frame
    label: int | None
    further: tuple[Picture, ...] = ()  # frames


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
        account: Of the bad samples; default: one of its own, which `max_bad_share` and `log` are for.
    """

    def __init__(
        self,
        dataset: Dataset,
        channels: int = 3,
        max_bad_share: float = MAX_BAD_SHARE,
        padded: bool = False,
        log: BadSampleLog | None = None,
        bits: int = 8,
        account: BadSampleAccount | None = None,
    ) -> None:
        self.dataset = dataset
        self.channels, self.bits, self.padded = channels, bits, padded
        self.account = account or BadSampleAccount(dataset.num_samples, max_bad_share, log)
        self._ends: list[int] = np.cumsum(dataset.shard_sizes).tolist()

    @property
    def num_reads(self) -> int:
        """Samples that were read so far, bad ones included."""
        return self.account.num_reads

    @property
    def num_bad(self) -> int:
        """Of those, how many could not be decoded."""
        return self.account.num_bad

    def read(self, sample: int, choose: Choose = whole, frames: ChooseFrames | None = None) -> Decoded:
        """The sample, or the first of its `neighbours` that can be decoded.

        `choose` is told the size of each image that is tried, the one returned last. `frames` tells which frames of a
        stack are wanted, see `decode_stack`; None: of one image.

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
                    if frames is None:
                        pictures = [decode_picture(stored, self.channels, choose, self.padded, self.bits)]
                    else:
                        pictures = decode_stack(stored, frames, self.channels, choose, self.padded, self.bits)
                except BadSampleError as error:
                    self.dataset.check_unchanged(number)
                    bad.append((number, error))
                    self.account.count_bad(error)
                    continue
                self.account.count_good()
                if notes := tuple(dict.fromkeys(note for picture in pictures for note in picture.notes)):
                    self.account.note(notes, f"sample {shown(stored.key)} of {stored.shard}")
                instead = stored.key
                return Decoded(number, pictures[0], stored.label, tuple(pictures[1:]))
        finally:
            for number, reason in bad:
                self.account.name(number, reason, instead)
        named = [str(error) for _, error in bad]
        more = [f"and {len(bad) - NUM_SHOWN} more"] if len(bad) > NUM_SHOWN else []
        raise TooManyBadSamplesError(
            f"{len(bad)} samples in a row cannot be decoded:\n  "
            + "\n  ".join(named[:NUM_SHOWN] + more)
            + f"\nSee what is wrong with `selfsight verify {bad[0][1].shard.parent}`, then pack the data again"
        )

    def neighbours(self, sample: int) -> Iterator[int]:
        """The samples that are tried in turn, see `tolerance.neighbours`."""
        return neighbours(self._ends, sample)
