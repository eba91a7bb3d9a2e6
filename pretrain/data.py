"""From the `data` section of a configuration to the samples of every batch."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipelines import executors
from data_pipelines.index import Dataset, open_dataset
from data_pipelines.sampler import Sampler
from pretrain.config import ConfigError, load_config
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
        repeats=config.data.repeats,
    )


def resolve_executor(config: Config) -> Config:
    """The configuration with the executor that `auto` stands for: the one the run began with, else this machine's best.

    Raises ConfigError where it is missing: another one's crops differ in single levels.
    """
    name = config.data.executor
    stored = Path(config.runs) / config.name / "config.yaml"
    begun = stored.is_file()
    if name == "auto" and begun:
        name = load_config(stored).data.executor
    try:
        name = executors.resolve_executor(name, config.data.channels, config.data.bits)
    except ValueError as error:
        if not begun:
            raise ConfigError(f"data.executor: {error}") from error
        raise ConfigError(f"{stored.parent} makes its crops by {name}, which is missing here: {error}") from error
    return dataclasses.replace(config, data=dataclasses.replace(config.data, executor=name))


def check_same_executor(name: str, world_size: int, device: torch.device) -> None:
    """Refuse ranks whose crops would differ, all of them together."""
    mine = torch.tensor([zlib.crc32(name.encode())], device=device)
    all_ranks = mine.new_empty(world_size)
    dist.all_gather_into_tensor(all_ranks, mine)
    if others := [rank for rank, checksum in enumerate(all_ranks.tolist()) if checksum != int(mine)]:
        raise ConfigError(
            f"this rank makes crops by {name}, but rank {others[0]} by another executor; install the package alike on "
            "all nodes, or set data.executor=wheels"
        )
