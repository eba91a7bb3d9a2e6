"""Counter-based random numbers: a stream for every purpose, found from integers and never stored.

SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"): number i of stream k
is `mix(k + i * gamma)`. Written out here because a run must give the same batches under every version of
NumPy, whose `Generator` promises no such thing, and because a stream of it costs next to nothing to start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines import native

#: Draws the fields that a method asks for of one row, masks for example: a function of (seed, step, row of the global
#: batch) alone, to arrays of always the same names, shapes and types. At native shape also of the grids of patches of
#: its views (views, 2), to a list of arrays, one a view.
DrawFields = Callable[..., Mapping[str, Any]]


class NamedDraw:
    """A `DrawFields` that other processes can make, too: a function's name, and what to call it with.

    Args:
        maker: "package.module:function", which makes a `DrawFields` of `given`.
        given: What JSON can say.
    """

    def __init__(self, maker: str, given: Any) -> None:
        self.maker, self.given = maker, given
        self._draw: DrawFields = resolve_name(maker)(given)

    def __call__(self, *place: Any) -> Mapping[str, Any]:
        return self._draw(*place)


class Purpose(IntEnum):
    """The second word of a stream's key, after the seed: no two uses of one seed share a stream."""

    PASS = 1
    WINDOW = 2
    CROPS = 3
    MASKS = 4
    HOLD_BACK = 5
    SHUFFLE = 6
    STATISTICS = 7
    DROP_PATH = 8
    GUMBEL = 9
    ROWS = 10
    CODES = 11
    FINETUNE = 12
    FRAMES = 13
    GATE_NOISE = 14
    COORDINATES = 15
    AREAS = 16
    SLICES = 17
    CAPTIONS = 18
    MIXUP = 19
    SIZES = 20


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
    return bits_at(key, np.arange(count, dtype=np.uint64))


def bits_at(key: int, places: np.ndarray) -> np.ndarray:
    """The numbers at these places of a stream, counted from 0: uint64 of the same shape."""
    with np.errstate(over="ignore"):
        return _mixed(np.uint64(key) + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))


def _mixed(words: np.ndarray) -> np.ndarray:
    """`mix` of many words."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(_MIX1)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(_MIX2)
        return words ^ (words >> np.uint64(31))


def stream_keys(*words: int | np.ndarray) -> np.ndarray:
    """`stream_key` of many streams at once: words may be arrays of integers, which are broadcast. uint64."""
    with np.errstate(over="ignore"):
        key = np.asarray(len(words), dtype=np.uint64)
        for word in words:
            key = _mixed(key * np.uint64(_MIX1) + np.asarray(word, dtype=np.uint64) + np.uint64(_GAMMA))
        return key


def uniform_table(keys: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers of each of the streams `keys` (n,), uniform in [0, 1): (n, count) float64."""
    with np.errstate(over="ignore"):
        words = keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return (_mixed(words) >> np.uint64(11)) * 2.0**-53


def permutation(stream: Stream, count: int) -> np.ndarray:
    """0 .. count - 1 in an order that the next number of `stream` decides, all orders alike: (count,) int64."""
    out = np.empty(count, dtype=np.int64)
    stream.permute(out)
    return out


class PythonStream:
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

    def permute(self, out: np.ndarray) -> None:
        """Fill `out`, int64, with 0 .. its length - 1 in an order that the next number decides."""
        out[:] = np.argsort(random_bits(self.bits(), len(out)), kind="stable")


if TYPE_CHECKING or not native.BUILT:  # noqa: SIM108 (mypy takes no conditional expression for a type)
    Stream = PythonStream
else:
    #: The same in C: drawing holds the interpreter's lock, so that its pace limits threads.
    Stream = native.kernel.Stream
