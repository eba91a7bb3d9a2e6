"""From the `data` section of a configuration to the samples of every batch."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.index import Dataset, open_dataset
from data_pipelines.sampler import Sampler
from pretrain.schema import Config
from pretrain.schema.run import DataConfig


def open_datasets(data: DataConfig) -> tuple[Dataset, ...]:
    """The data sets that a run is shown. Raises as `open_dataset` does."""
    return (open_dataset(data.train),)


def sampler_of(config: Config, datasets: Sequence[Dataset]) -> Sampler:
    """The order in which a run is shown its data; raises ValueError if they are fewer than a batch."""
    return Sampler(
        datasets,
        seed=config.seed,
        batch_size=config.train.batch_size,
        lanes=config.data.lanes,
        window=config.data.shuffle_window,
    )
