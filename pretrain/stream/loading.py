"""From the `data` section of a configuration to the samples of every batch."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data_pipelines.loader import Loader
from data_pipelines.rows import default_workers
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.backends import select
from pretrain.config import Config
from pretrain.config.load import ConfigError, load_config
from pretrain.methods.registry import draw_fields_for, spec_of

if TYPE_CHECKING:
    from pretrain.methods.base import Normalisation


def loader_of(config: Config, sampler: Sampler, **options: Any) -> Loader:
    """The loader of a run; `options` are further arguments of `Loader`, or others than the configuration's."""
    data = config.data
    arguments: dict[str, Any] = {
        "draw": draw_fields_for(config),
        "workers": _workers(data.workers, sampler),
        "threads": data.threads,
        "prefetch": data.prefetch,
        "max_bad_share": data.max_bad_share,
        "shard_prefetch_steps": data.cache.prefetch_steps,
        "channels": data.channels,
        "bits": data.bits,
        "frames": data.frames,
        "frame_stride": data.frame_stride,
        "backend": data.backend,
        "partial_decode": data.partial_decode,
        "dct_scaling": data.dct_scaling,
        "masks": spec_of(config.method).masks(config.method),
    }
    return Loader(sampler, config.views, **(arguments | options))


def _workers(chosen: int | str, sampler: Sampler) -> int:
    return default_workers(list(sampler.datasets.values())) if isinstance(chosen, str) else chosen


def resolve_backend(config: Config) -> Config:
    """The configuration with the backend that `auto` stands for: the one the run began with, else this machine's best.

    Raises ConfigError where it is missing: another one's crops differ in single levels.
    """
    name = config.data.backend
    stored = Path(config.runs) / config.name / "config.yaml"
    begun = stored.is_file()
    if name == "auto" and begun:
        name = load_config(stored).data.backend
    try:
        name = select.resolve_backend(name, config.data.channels, config.data.bits)
    except ValueError as error:
        if not begun:
            raise ConfigError(f"data.backend: {error}") from error
        raise ConfigError(f"{stored.parent} makes its crops by {name}, which is missing here: {error}") from error
    return dataclasses.replace(config, data=dataclasses.replace(config.data, backend=name))


def check_ranks_agree(
    loader: Loader, normalisation: Normalisation, world_size: int, device: torch.device, settings: object = None
) -> None:
    """Refuse ranks whose batches would not be parts of the same ones, all of them together.

    Each rank opens the data for itself, and a file system may show a new shard, or what the run folder says of an
    `auto`, to one node before the others. `settings`: what of the configuration decides the shapes of the model.
    """
    sampler = loader.sampler
    facts = (loader.backend, _order_of(sampler), repr(normalisation), repr(settings))
    mine = torch.tensor([zlib.crc32(fact.encode()) for fact in facts], device=device)
    all_ranks = mine.new_empty(world_size * len(facts))
    dist.all_gather_into_tensor(all_ranks, mine)
    differing = (all_ranks.view(world_size, len(facts)) != mine).nonzero().tolist()
    if not differing:
        return
    rank, fact = min(differing, key=lambda found: found[1])
    raise ConfigError(
        (
            f"this rank makes crops by {loader.backend}, but rank {rank} by another backend; install the package "
            "alike on all nodes, or set data.backend=opencv",
            f"this rank is to show {sampler.summary()}, but rank {rank} something else; see to it that every node "
            "sees the same shards under data.train, and start again",
            f"this rank normalises by {normalisation}, but rank {rank} by other numbers; see to it that every node "
            "sees the same dataset.json beside the shards, or set data.mean and data.std",
            f"this rank trains by {settings}, but rank {rank} by other settings; see to it that every node sees the "
            "same run folder, or give a number where method says auto",
        )[fact]
    )


def _order_of(sampler: Sampler) -> str:
    """All that decides which samples are shown; each node may have its copy of the data under a name of its own."""
    parts = [
        (segment.start_step, [dataclasses.replace(part, name="") for part in segment.parts])
        for segment in sampler.segments
    ]
    return repr((sampler.seed, sampler.batch_size, sampler.window, sampler.repeats, sampler.is_permuted, parts))
