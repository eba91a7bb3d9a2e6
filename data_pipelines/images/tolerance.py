"""What a run bears of a data set and what ends it: the one judgement, for a run and for `selfsight verify`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

MAX_BAD_SHARE = 0.01  # data.max_bad_share, unless a run sets another
MAX_TRIES = 16  # neighbours in a row
_MIN_READS = 1000  # a share of fewer reads means little


class ShardCount(NamedTuple):
    """What was found in a shard."""

    shard: object  # its name or place, for messages
    num_samples: int
    is_damaged: bool  # cut short, or no tar: it may have held more


def losses_told(shards: Sequence[ShardCount], packed: Mapping[str, int], max_bad_share: float) -> tuple[str, object]:
    """Why shards that have lost samples end a run, in words, and the first of them; no words if they do not.

    What a shard held is known where it was packed here. One that is damaged and has no sample, of which that is not
    known, is taken to have held as many as the others on average; one that is whole and empty has lost nothing.

    Args:
        shards: All of a run.
        packed: Samples by shard's name, as far as `dataset.json` tells.
        max_bad_share: Of the samples, lost ones included.
    """
    num_samples = sum(found.num_samples for found in shards)
    mean = num_samples / max(1, sum(found.num_samples > 0 for found in shards))
    lost: dict[object, float] = {}
    for found in shards:
        guessed = mean if found.is_damaged and not found.num_samples else found.num_samples
        held = packed.get(str(getattr(found.shard, "name", found.shard)), guessed)
        if held > found.num_samples:
            lost[found.shard] = held - found.num_samples
    num_lost = round(sum(lost.values()))
    if num_lost <= max_bad_share * (num_lost + num_samples):
        return "", None
    first = next(iter(lost))
    return (
        f"{len(lost)} of {len(shards)} shards are damaged and have lost about {num_lost:,} of "
        f"{num_lost + num_samples:,} samples, more than the permitted share of {max_bad_share:g} "
        f"(data.max_bad_share); the first of them is {first}",
        first,
    )


def too_many(num_bad: int, num_reads: int, num_samples: int, max_bad_share: float) -> bool:
    """Whether bad reads end a run. The share is of at least 1,000 reads (of all samples, if they are fewer), so that
    one early bad sample does not."""
    return num_bad > max_bad_share * max(num_reads, min(_MIN_READS, num_samples))


def neighbours(ends: Sequence[int], sample: int) -> Iterator[int]:
    """The samples that are tried in turn: the sample, those after it in its shard, around its end, and then those of
    the next shards; 16 in all. Most stay in a shard that is open, or fetched, already.

    Args:
        ends: Samples up to the end of each shard.
        sample: Its number.
    """
    shard = bisect_right(ends, sample)
    begin, end, num_samples = int(ends[shard - 1]) if shard else 0, int(ends[shard]), int(ends[-1])
    further = (number % num_samples for number in range(end, begin + num_samples))
    return islice(chain(range(sample, end), range(begin, sample), further), MAX_TRIES)


def dead_end(ends: Sequence[int], bad: Collection[int]) -> list[int]:
    """The first sample that is tried in vain, and the others that are tried in its place; empty: there is none."""
    for sample in sorted(bad):
        tried = list(neighbours(ends, sample))
        if all(number in bad for number in tried):
            return tried
    return []


def best_channels(counts: Mapping[int, int]) -> tuple[int, int]:
    """The number of channels with which a run can use most images, and how many it cannot use then.

    Args:
        counts: Images by their channels; grey and RGB are made of each other.
    """
    usable = {
        channels: count + counts.get({1: 3, 3: 1}.get(channels, 0), 0) for channels, count in sorted(counts.items())
    }
    best = max(usable, key=lambda channels: (usable[channels], channels == 3))
    return best, sum(counts.values()) - usable[best]
