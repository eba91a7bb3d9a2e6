"""Which sample fills which row of which batch, for a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.mixture import Mixture
from data_pipelines.order import MAX_LANES, Order, default_lanes
from data_pipelines.rng import Purpose, Stream, permutation
from data_pipelines.wording import samples_in

_PERMUTED = "permuted"


class Row(NamedTuple):
    """What one row of a global batch shows; with the seed, all that its crops depend on."""

    dataset: int  # the key of `Sampler.datasets`
    sample: int  # of that data set
    epoch: int  # the pass over that data set
    repeat: int = 0  # of a sample shown more than once in a batch, the how-manieth showing

    def identity(self, seed: int) -> tuple[int, ...]:
        """The words of the stream that its crops are drawn from."""
        showing = (seed, Purpose.CROPS, self.dataset, self.epoch, self.sample)
        return (*showing, self.repeat) if self.repeat else showing


@dataclass(frozen=True)
class SegmentPart:
    """A data set's part in a segment of a run: all that its own order depends on, beside the run's seed and window."""

    dataset: int
    name: str
    checksum: str
    num_samples: int
    weight: Fraction
    batch_size: int  # of its own order, about its share of a batch
    lanes: int
    first_pass: int = 0

    @property
    def pass_length(self) -> int:
        """Samples shown in a pass."""
        return self.num_samples // self.batch_size * self.batch_size


@dataclass(frozen=True)
class Segment:
    """The steps from `start_step` on, up to the next segment, which are shown the same data sets."""

    start_step: int
    parts: tuple[SegmentPart, ...]


class Sampler:
    """The rows of every global batch: a function of (seed, data, weights, batch size, lanes, window, step) alone.

    Of several data sets, each row is dealt to one by the exact shares of `Mixture`, and each set's rows follow an
    `Order` of their own, in passes of their own: one ends as a set of others begins, so a batch may hold the last
    samples of a set's pass and the first of its next. Of one data set, batch t is its order's batch t.

    The rows of a batch are in an order of their own, drawn for each step: the rows of a rank are of all lanes and all
    data sets alike. In a run that began before that was so, they stay ordered by lane (`is_permuted`).

    An epoch is one pass over a single data set; of several, as many rows as they have samples together. With
    `repeats`, likewise as many rows as there are samples.

    When data grow while a run goes on, it gets one more segment: from some step on, other data sets under other keys.
    Its length in steps and its epochs are those of the first segment.

    Args:
        datasets: What is shown.
        seed: Of order, crops and masks.
        batch_size: B, the global batch.
        lanes: See `Order`; of several data sets, at most so many of each.
        window: See `Order`.
        repeats: m, rows next to each other that show the same sample, each with crops of its own (repeated
            augmentation, Hoffer et al. 2020).
        weights: Of each data set, of which only the ratios count. Default: their numbers of samples.
        names: Of each data set, for messages. Default: their numbers.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        seed: int,
        batch_size: int,
        lanes: int | None = None,
        window: int = 1024,
        repeats: int = 1,
        weights: Sequence[float | Fraction] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if batch_size < 1 or repeats < 1 or batch_size % repeats:
            raise ValueError(
                f"a batch of {batch_size} rows does not hold each sample {repeats} times; take a multiple of {repeats}"
            )
        names = names or [str(number) for number in range(len(datasets))]
        shares = [Fraction(str(w)) for w in weights] if weights else [Fraction(d.num_samples) for d in datasets]
        mixture, draws = Mixture(shares), batch_size // repeats
        parts = []
        for number, (dataset, name) in enumerate(zip(datasets, names, strict=True)):
            size, own_lanes = _own_batch(
                dataset.num_samples, draws * mixture.shares[number], draws, lanes, window, name
            )
            checksum, count = dataset.checksum, dataset.num_samples
            parts.append(SegmentPart(number, name, checksum, count, shares[number], size, own_lanes))
        self.seed, self.batch_size, self.window, self.repeats = seed, batch_size, window, repeats
        self.is_permuted = True
        self.datasets: Mapping[int, Dataset] = dict(enumerate(datasets))
        self.segments: tuple[Segment, ...] = (Segment(0, tuple(parts)),)
        self._orders: dict[tuple[int, int, int], Order] = {}
        for part in parts:
            self._order(part)  # raises what is wrong with it at once

    @property
    def num_samples(self) -> int:
        """Of all data sets of the last segment together."""
        return sum(part.num_samples for part in self.segments[-1].parts)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that show as many rows as there are samples at the run's start; of one data set, those of a pass."""
        return float(self._steps_per_epoch(self.segments[0]))

    def summary(self) -> str:
        """What is shown, in words."""
        parts = self.segments[-1].parts
        total = sum(part.weight for part in parts)
        if len(parts) == 1:
            return samples_in(parts[0].num_samples, len(self.datasets[parts[0].dataset].shards))
        told = (f"{float(part.weight / total):.3%} {part.name} ({part.num_samples:,} samples)" for part in parts)
        return f"{self.num_samples:,} samples; of each batch, {', '.join(told)}"

    def segment(self, step: int) -> Segment:
        """The segment that a step belongs to."""
        return self.segments[bisect_right([segment.start_step for segment in self.segments], step) - 1]

    def rows(self, step: int, rows: range) -> list[Row]:
        """The rows of these numbers, out of 0 .. B - 1, of global batch `step`."""
        if step < 0:
            raise ValueError(f"the step is {step}; steps count from 0")
        segment = self.segment(step)
        draws = self.batch_size // self.repeats
        begin = (step - segment.start_step) * draws
        first, last = rows.start // self.repeats, -(-rows.stop // self.repeats)
        chosen = np.arange(first, last)  # places in the batch
        if self.is_permuted:
            chosen = permutation(Stream(self.seed, Purpose.ROWS, step), draws)[first:last]
        sets, places = np.zeros(len(chosen), np.int64), begin + chosen
        if len(segment.parts) > 1:
            dealt = Mixture([part.weight for part in segment.parts]).deal(begin, draws)
            sets, places = (numbers[chosen] for numbers in dealt)
        samples, epochs = np.zeros(len(sets), np.int64), np.zeros(len(sets), np.int64)
        for number, part in enumerate(segment.parts):
            own = sets == number
            samples[own], epochs[own] = self._samples(part, places[own])
        keys = [part.dataset for part in segment.parts]
        drawn = list(zip((keys[number] for number in sets.tolist()), samples.tolist(), epochs.tolist(), strict=True))
        return [Row(*drawn[row // self.repeats - first], row % self.repeats) for row in rows]

    def state(self) -> dict[str, Any]:
        """What a resumed run must agree on to be shown the same batches, for JSON; see `continued`."""
        permuted = {"rows": _PERMUTED} if self.is_permuted else {}
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "window": self.window,
            "repeats": self.repeats,
            **permuted,
            "segments": [_written(segment) for segment in self.segments],
        }

    @classmethod
    def continued(cls, state: Mapping[str, Any], datasets: Mapping[int, Dataset]) -> Sampler:
        """The sampler whose `state` that is; rows of segments whose data sets are not among `datasets` can't be asked
        for. A state that does not say how rows are ordered is of a run that has them ordered by lane.

        Raises:
            ValueError: Rows are ordered in a way that a later version must know.
        """
        order = state.get("rows")
        if order not in (None, _PERMUTED):
            raise ValueError(
                f"the rows of the run's batches are ordered by {order!r}, which this version does not know"
            )
        sampler = cls.__new__(cls)
        sampler.is_permuted = order is not None
        sampler.seed, sampler.batch_size = state["seed"], state["batch_size"]
        sampler.window, sampler.repeats = state["window"], state["repeats"]
        sampler.datasets = dict(datasets)
        sampler.segments = tuple(_read(segment) for segment in state["segments"])
        sampler._orders = {}
        return sampler

    def grown(self, now: Sampler, step: int) -> Sampler:
        """This sampler up to the end of the epoch that `step` is in, and from there on the data sets of `now`.

        The end is a whole number of passes of a single data set. Segments that would begin later have never been shown
        and are dropped. Each data set begins a new pass, under a key of its own unless it is unchanged.
        """
        segments = [segment for segment in self.segments if segment.start_step < step] or [self.segments[0]]
        last = segments[-1]
        boundary = last.start_step + _next_multiple(self._epoch_length(last), step - last.start_step)
        draws = (boundary - last.start_step) * (self.batch_size // self.repeats)
        shown = Mixture([part.weight for part in last.parts]).counts(draws)
        next_key = 1 + max(part.dataset for segment in segments for part in segment.parts)
        parts, datasets = [], dict(self.datasets)
        if not step:
            segments.clear()
        for count, old, new in zip(shown, last.parts, now.segments[-1].parts, strict=True):
            first_pass = old.first_pass + -(-count // old.pass_length)
            if old.checksum == new.checksum:
                key = old.dataset
            else:
                key, next_key = next_key, next_key + 1
                datasets[key] = now.datasets[new.dataset]
            parts.append(replace(new, dataset=key, first_pass=first_pass))
        grown = Sampler.continued(self.state(), datasets)
        grown.segments = (*segments, Segment(boundary, tuple(parts)))
        return grown

    def _samples(self, part: SegmentPart, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and passes at these places of a data set's own rows."""
        order = self._order(part)
        batches, offsets = np.divmod(places, part.batch_size)
        samples = np.zeros(len(places), np.int64)
        for batch in np.unique(batches).tolist():
            here = batches == batch
            samples[here] = order.ids(batch + part.first_pass * order.steps_per_pass, offsets[here])
        return samples, part.first_pass + batches // order.steps_per_pass

    def _order(self, part: SegmentPart) -> Order:
        key = part.dataset, part.batch_size, part.lanes
        if key not in self._orders:
            if part.dataset not in self.datasets:
                raise ValueError(f"data set {part.name!r} as it was in an earlier part of the run is not open")
            sizes = self.datasets[part.dataset].shard_sizes
            self._orders[key] = Order(self.seed, sizes, part.batch_size, part.lanes, self.window)
        return self._orders[key]

    def _steps_per_epoch(self, segment: Segment) -> Fraction:
        if len(segment.parts) == 1:
            return Fraction(self._epoch_length(segment)) / self.repeats
        return self._epoch_length(segment)

    def _epoch_length(self, segment: Segment) -> Fraction:
        """Steps after which new data may be shown."""
        if len(segment.parts) == 1:
            return Fraction(segment.parts[0].num_samples // segment.parts[0].batch_size)
        return Fraction(sum(part.num_samples for part in segment.parts), self.batch_size)


def _own_batch(
    num_samples: int, share: Fraction, draws: int, lanes: int | None, window: int, name: str
) -> tuple[int, int]:
    """Batch size and lanes of the order of a data set that has `share` of the `draws` samples of a batch."""
    if share == draws:
        return draws, lanes if lanes is not None else default_lanes(num_samples, draws, window)
    rows = max(1, int(share))
    if num_samples < rows:
        raise ValueError(
            f"data set {name!r} has {num_samples} samples, and its weight gives it {float(share):.4g} of a batch of "
            f"{draws}, which holds different samples; give it a smaller weight, or take a smaller batch"
        )
    most = max(1, min(lanes or MAX_LANES, num_samples // window, rows))
    found = next(n for n in range(most, 0, -1) if 4 * (rows // n * n) >= 3 * rows)
    return rows // found * found, found


def _next_multiple(length: Fraction, steps: int) -> int:
    """The first whole step at or after a multiple of `length` that is at or after `steps`."""
    return math.ceil(math.ceil(steps / length) * length)


def _written(segment: Segment) -> dict[str, Any]:
    parts = [asdict(part) | {"weight": str(part.weight)} for part in segment.parts]
    return {"start_step": segment.start_step, "parts": parts}


def _read(segment: Mapping[str, Any]) -> Segment:
    parts = (SegmentPart(**{**part, "weight": Fraction(part["weight"])}) for part in segment["parts"])
    return Segment(segment["start_step"], tuple(parts))
