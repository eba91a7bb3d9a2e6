"""Which sample fills which row of which batch, for a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipelines.index import Dataset
from data_pipelines.order import Order


class Row(NamedTuple):
    """What one row of a global batch shows; with the seed, all that its crops depend on."""

    dataset: int
    sample: int  # of that data set
    epoch: int  # the pass over that data set
    repeat: int = 0  # of a sample shown more than once in a batch, the how-manieth showing


class Sampler:
    """The rows of every global batch: a function of (seed, data, batch size, lanes, window, step) alone.

    Args:
        datasets: What is shown.
        seed: Of order, crops and masks.
        batch_size: B, the global batch.
        lanes: See `Order`.
        window: See `Order`.
        repeats: m, rows next to each other that show the same sample, each with crops of its own (repeated
            augmentation, Hoffer et al. 2020). An epoch is as many rows as there are samples, so m of them are a pass.
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
    ) -> None:
        (dataset,) = datasets
        if batch_size % repeats:
            raise ValueError(f"a batch of {batch_size} rows does not hold each sample {repeats} times; take a multiple")
        self.datasets = tuple(datasets)
        self.seed, self.batch_size, self.repeats = seed, batch_size, repeats
        self._order = Order(seed, dataset.shard_sizes, batch_size // repeats, lanes, window)

    @property
    def num_samples(self) -> int:
        """Of all data sets together."""
        return sum(dataset.num_samples for dataset in self.datasets)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that show as many rows as there are samples; a pass over them, where none is repeated."""
        return self._order.steps_per_pass / self.repeats

    def summary(self) -> str:
        """What is shown, in words."""
        return f"{self.num_samples:,} samples in {sum(len(dataset.shards) for dataset in self.datasets):,} shards"

    def rows(self, step: int, rows: range) -> list[Row]:
        """The rows of these numbers, out of 0 .. B - 1, of global batch `step`."""
        epoch = self._order.epoch(step)
        ids = self._order.ids(step).tolist()
        return [Row(0, ids[row // self.repeats], epoch, row % self.repeats) for row in rows]

    def state(self) -> dict[str, Any]:
        """What a resumed run must agree on to be shown the same batches."""
        (dataset,) = self.datasets
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "lanes": self._order.lanes,
            "window": self._order.window,
            "repeats": self.repeats,
            "dataset": dataset.checksum,
        }
