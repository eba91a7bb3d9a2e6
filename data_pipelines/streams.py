"""Counter-based random numbers: a stream for every purpose, found from integers and never stored.

SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"): number i of stream k
is `mix(k + i * gamma)`. Written out here because a run must give the same batches under every version of
NumPy, whose `Generator` promises no such thing, and because a stream of it costs next to nothing to start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import chain

import numpy as np


class Purpose(IntEnum):
    """The second word of a stream's key, after the seed: no two uses of one seed share a stream."""

    PASS = 1
    WINDOW = 2
    CROPS = 3
    MASKS = 4
    HOLD_BACK = 5
    SHUFFLE = 6
    STATISTICS = 7


_GAMMA, _MIX1, _MIX2, _64_BITS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


def mix(word: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    word = ((word ^ (word >> 30)) * _MIX1) & _64_BITS
    word = ((word ^ (word >> 27)) * _MIX2) & _64_BITS
    return word ^ (word >> 31)


def stream_key(*words: int) -> int:
    """A 64-bit key for the stream of random numbers that belongs to these integers, in this order."""
    key = len(words)
    for word in words:
        key = mix((key * _MIX1 + word + _GAMMA) & _64_BITS)
    return key


def random_bits(key: int, count: int) -> np.ndarray:
    """The first `count` numbers of a stream: (count,) uint64."""
    with np.errstate(over="ignore"):
        return _mixed(np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA))


class Stream:
    """The same stream one number at a time, for draws too few to be worth an array."""

    def __init__(self, *words: int) -> None:
        self._state = stream_key(*words)

    def bits(self) -> int:
        """The next 64 random bits."""
        self._state = (self._state + _GAMMA) & _64_BITS
        return mix(self._state)

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""
        return (self.bits() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """The next number, uniform in [low, high)."""
        return low + (high - low) * self.random()

    def integer(self, count: int) -> int:
        """The next integer of 0 .. count - 1."""
        return int(self.random() * count)


class ReadyStream:
    """A stream again, the first numbers of which are there already; see `ready_streams`."""

    __slots__ = ("random",)

    def __init__(self, key: int, first: Sequence[float]) -> None:
        #: The next number, uniform in [0, 1); an attribute, as a method would take longer than the number.
        self.random = chain(first, _following(key, len(first))).__next__


def ready_streams(
    identities: Sequence[tuple[int, ...]], count: int, numbers: int
) -> list[list[tuple[int, list[float]]]]:
    """For each identity, the arguments of `ReadyStream` for `Stream(*identity, 0)` to `Stream(*identity, count - 1)`.

    Many streams at once cost a tenth of as many `Stream`s, whose numbers are the same. The identities have less than
    2^64 streams and are of any lengths; `numbers` of each stream are made now.
    """
    begun = [_begun(identity) for identity in identities]
    with np.errstate(over="ignore"):
        words = np.array(begun, dtype=np.uint64)[:, None] * np.uint64(_MIX1) + np.arange(count, dtype=np.uint64)
        keys = _mixed(words + np.uint64(_GAMMA))  # (identities, count)
        steps = np.arange(1, numbers + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        bits = _mixed(keys[:, :, None] + steps)
    uniform = (bits >> np.uint64(11)) * 2.0**-53
    return [
        list(zip(row_keys, row, strict=True)) for row_keys, row in zip(keys.tolist(), uniform.tolist(), strict=True)
    ]


def _begun(identity: tuple[int, ...]) -> int:
    """What `stream_key` has made of an identity before the last word, which is to come."""
    key = len(identity) + 1
    for word in identity:
        key = mix((key * _MIX1 + word + _GAMMA) & _64_BITS)
    return key


def _mixed(words: np.ndarray) -> np.ndarray:
    """`mix` of every word, uint64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MIX1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MIX2)
    return words ^ (words >> np.uint64(31))


def _following(key: int, count: int) -> Iterator[float]:
    """The numbers of a stream after its first `count`."""
    while True:
        count += 1
        yield (mix((key + count * _GAMMA) & _64_BITS) >> 11) * 2.0**-53
