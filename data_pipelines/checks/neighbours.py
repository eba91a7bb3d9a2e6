"""All pairs that lie near each other: of bit strings by Hamming distance, of vectors by angle. None is missed.

Hashes are joined by the pigeonhole principle (multi-index hashing; Norouzi et al. 2012, "Fast search in Hamming space
with multi-index hashing"): cut into m chunks whose radii r_k satisfy sum(r_k + 1) = radius + 1, two hashes within the
radius are within r_k of each other in some chunk k.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.cores import cores_per_process

_MAX_CHUNK_BITS = 22  # a chunk's table has an entry for each of its values
_BLOCK = 1 << 18  # candidates compared at a time: they stay in the processor's cache


class Pairs(NamedTuple):
    """Pairs of rows with first < second, each pair once, in no order."""

    first: np.ndarray  # (p,) int64
    second: np.ndarray  # (p,) int64
    distance: np.ndarray  # (p,) float32


@dataclass(frozen=True)
class _Chunk:
    bits: range  # positions in the hash; strided, because neighbouring bits depend on each other
    radius: int

    @property
    def flips(self) -> list[int]:
        """All patterns of at most `radius` turned bits."""
        return [
            sum(1 << bit for bit in turned)
            for count in range(self.radius + 1)
            for turned in combinations(range(len(self.bits)), count)
        ]

    def keys(self, words: np.ndarray) -> np.ndarray:
        """The chunk's value of every hash: (n,) uint32 of (n, words) uint64."""
        keys = np.zeros(len(words), dtype=np.uint32)
        for place, bit in enumerate(self.bits):
            column = words[:, bit // 64] >> np.uint64(bit % 64)
            keys |= (column & np.uint64(1)).astype(np.uint32) << np.uint32(place)
        return keys

    def within(self, differences: np.ndarray) -> np.ndarray:
        """Whether hashes that differ in these bits, (n, words), are within the chunk's radius: (n,) bool."""
        mask = np.zeros(differences.shape[1], dtype=np.uint64)
        for bit in self.bits:
            mask[bit // 64] |= np.uint64(1) << np.uint64(bit % 64)
        return np.bitwise_count(differences & mask).sum(axis=1) <= self.radius


def _plan(count: int, num_bits: int, radius: int) -> list[_Chunk]:
    """The chunks that cost least for `count` random hashes."""

    def cut(parts: int) -> list[_Chunk]:
        base, extra = divmod(radius + 1, parts)
        radii = [base if part < extra else base - 1 for part in range(parts)]
        return [_Chunk(range(part, num_bits, parts), r) for part, r in enumerate(radii) if r >= 0]

    def cost(chunks: list[_Chunk]) -> float:
        total = 0.0
        for chunk in chunks:
            size, probes = 2.0 ** len(chunk.bits), sum(comb(len(chunk.bits), r) for r in range(chunk.radius + 1))
            total += size + probes * count * (1 + count / size)
        return total

    fewest = -(-num_bits // _MAX_CHUNK_BITS)
    return min((cut(parts) for parts in range(fewest, num_bits + 1)), key=cost)


def hamming_pairs(
    hashes: np.ndarray, radius: int, *, turned: np.ndarray | None = None, threads: int | None = None
) -> Iterator[Pairs]:
    """Every pair of hashes at most `radius` bits apart, a part at a time.

    Args:
        hashes: (n, words) uint64.
        radius: Largest number of bits in which two may differ.
        turned: (words,) uint64. The distance is then between a hash and the other with these bits turned.
        threads: Default: the cores this process may use.
    """
    num_bits = 64 * hashes.shape[1]
    if not 0 <= radius < num_bits:
        raise ValueError(f"the radius is {radius}; between hashes of {num_bits} bits it is 0 .. {num_bits - 1}")
    if len(hashes) < 2:
        return
    others = hashes if turned is None else hashes ^ turned
    done: list[_Chunk] = []
    with ThreadPoolExecutor(threads or cores_per_process()) as pool:
        for chunk in _plan(len(hashes), num_bits, radius):
            join = _Join(chunk, tuple(done), hashes, others, radius, itself=turned is None)
            for found in pool.map(join.probe, chunk.flips):
                yield from found
            done.append(chunk)


class _Join:
    """The pairs that one chunk finds and no earlier chunk did."""

    def __init__(
        self,
        chunk: _Chunk,
        earlier: tuple[_Chunk, ...],
        hashes: np.ndarray,
        others: np.ndarray,
        radius: int,
        itself: bool,
    ) -> None:
        self.earlier, self.radius, self.itself = earlier, radius, itself
        keys = chunk.keys(hashes)
        self.order = np.argsort(keys, kind="stable")
        self.keys, self.words = keys[self.order], np.ascontiguousarray(hashes[self.order].T)
        if itself:
            other_keys, self.other_order, self.other_words = keys, self.order, self.words
        else:
            other_keys = chunk.keys(others)
            self.other_order = np.argsort(other_keys, kind="stable")
            self.other_words = np.ascontiguousarray(others[self.other_order].T)
        sizes = np.bincount(other_keys, minlength=1 << len(chunk.bits))
        self.starts = np.concatenate([[0], np.cumsum(sizes)])

    def probe(self, flip: int) -> list[Pairs]:
        """The pairs whose keys differ in exactly the bits of `flip`."""
        wanted = self.keys ^ np.uint32(flip)
        # a pair of one set shows twice, from either side: the side of the smaller key counts
        rows = np.flatnonzero(wanted >= self.keys) if self.itself else np.arange(len(wanted))
        lows = self.starts[wanted[rows]]
        counts = self.starts[wanted[rows] + np.int64(1)] - lows
        rows, lows, counts = (values[counts > 0] for values in (rows, lows, counts))
        ends = np.cumsum(counts)
        found, first = [], 0
        while first < len(rows):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
            found.append(self._compare(rows[first:last], lows[first:last], counts[first:last]))
            first = last
        return [pairs for pairs in found if len(pairs.first)]

    def _compare(self, rows: np.ndarray, lows: np.ndarray, counts: np.ndarray) -> Pairs:
        """Rows of ours, each against `counts` of the others from `lows` on."""
        ours = np.repeat(rows, counts)
        theirs = np.arange(len(ours)) + np.repeat(lows - (np.cumsum(counts) - counts), counts)
        # most differ too much in the first word already
        rough = np.bitwise_count(self.words[0][ours] ^ self.other_words[0][theirs]) <= self.radius
        ours, theirs = ours[rough], theirs[rough]
        one, two = self.order[ours], self.other_order[theirs]
        differences = (self.words[:, ours] ^ self.other_words[:, theirs]).T
        distance = np.bitwise_count(differences).sum(axis=1)
        fresh = (distance <= self.radius) & (one != two)
        for chunk in self.earlier:
            fresh &= ~chunk.within(differences)
        first, second = np.minimum(one, two)[fresh], np.maximum(one, two)[fresh]
        # where both sides were probed (within one bucket, and with turned bits), a pair shows twice
        once = (one < two)[fresh] | (self.itself & (self.keys[ours] != self.keys[theirs])[fresh])
        return Pairs(first[once], second[once], distance[fresh][once].astype(np.float32))


def cosine_pairs(
    features: Tensor, least: float, *, device: torch.device | str = "cpu", rows: int = 2048, columns: int = 16384
) -> Iterator[Pairs]:
    """Every pair of features (n, d) whose cosine is at least `least`, a part at a time; its distance is 1 - cosine.

    Every row is compared with every other, `rows` x `columns` at a time, on the device: n^2 d operations.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    for top in range(0, len(unit), rows):
        ours = unit[top : top + rows].to(device)
        for left in range(top, len(unit), columns):
            cosines = ours @ unit[left : left + columns].to(device).T
            first, second = (cosines >= least).nonzero(as_tuple=True)
            above = second + left > first + top
            first, second = first[above], second[above]
            distance = 1 - cosines[first, second]
            yield Pairs((first + top).cpu().numpy(), (second + left).cpu().numpy(), distance.cpu().numpy())
