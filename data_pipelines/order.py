"""The order of samples: a pure function of (seed, shard sizes, batch size, step).

Ranks, threads and restarts do not enter, so neither do they change what a model sees. Nothing is
stored: any step is found in time proportional to the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock

import numpy as np

from data_pipelines.rng import Purpose, bits_at, random_bits, stream_key

MAX_LANES = 512


class Order:
    """Which samples make up global batch number `step`.

    A pass over the data has `floor(N / B)` batches of B of the N samples, all different. In pass e

    1. `N mod B` samples, next to each other, are left out; they are other ones in the following
       pass, so whatever one pass leaves out the next one shows;
    2. the shards are permuted, laid end to end and rotated by a random amount;
    3. this axis is cut into L lanes of equal length, each lane into windows of about `window`
       samples, and each window is shuffled;
    4. batch t takes the t-th `B / L` samples of every lane, ordered by lane; `Sampler` deals them out to rows.

    A lane reads its shards front to back, so a shard is open for a short while only, and a batch
    mixes L places of the data set, which is what data sorted by class need.

    Args:
        seed: Any non-negative integer.
        shard_sizes: Samples per shard.
        batch_size: B, the global batch.
        lanes: L, a divisor of B. Default: the largest one up to 512 that leaves every lane at
            least one full window, so that small data are shuffled as a whole.
        window: Samples shuffled together within a lane.
    """

    def __init__(
        self, seed: int, shard_sizes: Sequence[int], batch_size: int, lanes: int | None = None, window: int = 1024
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        if batch_size < 1 or self.num_samples < batch_size:
            raise ValueError(
                f"the batch size is {batch_size} and the data set has {self.num_samples} samples; "
                f"a batch holds different samples, so take a batch size (train.batch_size) of 1 to {self.num_samples}"
            )
        if window < 1:
            raise ValueError(f"the shuffle window is {window}; it must be 1 or more samples")
        if seed < 0:
            raise ValueError(f"the seed is {seed}; it must be 0 or more")
        if lanes is None:
            lanes = default_lanes(self.num_samples, batch_size, window)
        elif lanes < 1 or batch_size % lanes:
            choices = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
            nearest = sorted(sorted(choices, key=lambda n: abs(n - lanes))[:3])
            raise ValueError(
                f"{lanes} lanes do not divide the batch of {batch_size} samples; "
                f"the nearest choices are {', '.join(map(str, nearest))}"
            )
        self.seed, self.batch_size, self.lanes, self.window = seed, batch_size, lanes, window
        self.steps_per_pass = self.num_samples // batch_size
        self._ends = np.cumsum(sizes)
        lane_length = self.steps_per_pass * batch_size // lanes
        self._lane_length = lane_length
        # windows of nearly equal size: a short last one would be hardly shuffled
        self._window_length = math.ceil(lane_length / math.ceil(lane_length / window))
        self._pieces = lru_cache(maxsize=4)(self._make_pieces)
        self._shuffled = lru_cache(maxsize=4)(self._make_shuffled)

    def epoch(self, step: int) -> int:
        """The pass that `step` belongs to; a batch never mixes two."""
        return step // self.steps_per_pass

    def ids(self, step: int, places: np.ndarray | None = None) -> np.ndarray:
        """Sample numbers of global batch `step`: (B,) int64.

        Args:
            step: Batches before it.
            places: Only of these places in the batch, of 0 .. B - 1; what others would cost is not done then.
        """
        if step < 0:
            raise ValueError(f"the step is {step}; steps count from 0")
        epoch, batch = divmod(step, self.steps_per_pass)
        per_lane = self.batch_size // self.lanes
        places = np.arange(self.batch_size) if places is None else places
        lanes, in_lane = np.divmod(places, per_lane)
        in_lane += batch * per_lane
        windows = in_lane // self._window_length
        along = np.empty(len(places), dtype=np.int64)  # the whole axis
        for window in range(batch * per_lane // self._window_length, int(windows.max(initial=-1)) + 1):
            here = windows == window
            start = window * self._window_length
            within = self._shuffled(epoch, window).of(lanes[here], in_lane[here] - start)
            along[here] = lanes[here] * self._lane_length + start + within
        return self._samples(epoch, along)

    def _samples(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Places on the axis of a pass -> sample numbers."""
        starts, firsts, rotation = self._pieces(epoch)
        places = (places + rotation) % (self.steps_per_pass * self.batch_size)
        piece = np.searchsorted(starts, places, side="right") - 1
        return firsts[piece] + places - starts[piece]

    def _make_pieces(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """A pass's axis: where each run of samples starts on it, the run's first sample, the rotation."""
        num_used = self.steps_per_pass * self.batch_size
        begin = (epoch + 1) * (self.num_samples - num_used) % self.num_samples  # the samples before it are left out
        cuts = [np.array([0, begin]), self._ends]
        if begin + num_used > self.num_samples:
            cuts.append(np.array([begin + num_used - self.num_samples]))
        else:
            cuts.append(np.array([begin + num_used]))
        edges = np.unique(np.concatenate(cuts))
        firsts, lengths = edges[:-1], np.diff(edges)
        used = (firsts - begin) % self.num_samples < num_used
        firsts, lengths = firsts[used], lengths[used]
        bits = random_bits(stream_key(self.seed, Purpose.PASS, epoch), len(firsts) + 1)
        permuted = np.argsort(bits[:-1], kind="stable")
        firsts, lengths = firsts[permuted], lengths[permuted]
        return np.cumsum(lengths) - lengths, firsts, int(bits[-1] % np.uint64(num_used))

    def _make_shuffled(self, epoch: int, window: int) -> _Shuffled:
        length = min(self._window_length, self._lane_length - window * self._window_length)
        return _Shuffled(stream_key(self.seed, Purpose.WINDOW, epoch, window), self.lanes, length)


class _Shuffled:
    """Permutations of one window in every lane, each found when it is first asked for: shuffling all lanes at once
    would take a fifth of a second at the windows' ends."""

    def __init__(self, key: int, lanes: int, length: int) -> None:
        self._key, self._length, self._lock = key, length, Lock()
        self._known = np.zeros(lanes, dtype=np.bool_)
        self._permutations = np.empty((lanes, length), dtype=np.int32)

    def of(self, lanes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Which place of the window comes at each of these places of these lanes."""
        with self._lock:
            new = np.unique(lanes[~self._known[lanes]])
            bits = bits_at(self._key, new[:, None] * self._length + np.arange(self._length))
            self._permutations[new] = np.argsort(bits, axis=1, kind="stable")
            self._known[new] = True
        return self._permutations[lanes, places]


def default_lanes(num_samples: int, batch_size: int, window: int = 1024) -> int:
    """The largest divisor of the batch, up to 512, that leaves each lane at least one full window."""
    most = max(1, min(MAX_LANES, num_samples // window))
    return max(n for n in range(1, min(most, batch_size) + 1) if batch_size % n == 0)
