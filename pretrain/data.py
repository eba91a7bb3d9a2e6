"""From the `data` section of a configuration to the samples of every batch."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data_pipelines.crops import executors
from data_pipelines.images.bad_samples import check_losses
from data_pipelines.loader import Loader
from data_pipelines.remote.cache import Cache, default_folder
from data_pipelines.remote.fetch import Patience
from data_pipelines.remote.urls import redact
from data_pipelines.sampler import Sampler
from data_pipelines.shards.index import Dataset, open_dataset
from pretrain.config import ConfigError, load_config
from pretrain.masking import draw_mask_for
from pretrain.schema import Config
from pretrain.schema.run import DataConfig, SourceConfig

if TYPE_CHECKING:
    from pretrain.methods import Normalisation
_HELD_OUT = ("dev", "test", "val", "valid", "validation")


def open_datasets(data: DataConfig) -> tuple[Dataset, ...]:
    """The data sets that a run is shown. Raises as `open_dataset` and `check_losses` do."""
    folder = default_folder(data.stage) if data.cache.dir is None else Path(data.cache.dir).expanduser() / "shards"
    patience = Patience(data.cache.tries, data.cache.timeout_seconds)
    cache = Cache(folder, int(data.cache.max_bytes), patience)
    datasets = tuple(open_dataset(source.path, cache=cache, stage=data.stage) for source in sources(data))
    for dataset in datasets:
        check_losses(dataset, data.max_bad_share)
    return datasets


def held_out_line(data: DataConfig, datasets: Sequence[Dataset]) -> list[str]:
    """What to tell of data sets that hold training shards and, as `*.tar` of a folder does, others beside them."""
    lines = []
    for source, dataset in zip(sources(data), datasets, strict=True):
        splits = {shard.name.partition("-")[0].removesuffix(".tar") for shard in dataset.shards}
        others = sorted(splits & set(_HELD_OUT))
        if "train" in splits and others:
            lines.append(
                f"{redact(source.path)} names shards of {' and '.join(others)} beside those of train, and the run "
                "learns from all of them; a folder's name stands for its train shards only"
            )
    return lines


def sources(data: DataConfig) -> tuple[SourceConfig, ...]:
    """The data sets of `data.train`, each with a name."""
    given = (SourceConfig(path=data.train),) if isinstance(data.train, str) else data.train
    names = [source.name or PurePath(redact(source.path).removesuffix("?***")).name for source in given]
    if len(set(names)) < len(names):  # two folders of one name
        names = [source.name or redact(source.path) for source in given]
    return tuple(dataclasses.replace(source, name=name) for source, name in zip(given, names, strict=True))


def weights_of(data: DataConfig, datasets: Sequence[Dataset]) -> list[float]:
    """The weight of each data set: what the configuration says, or its number of samples."""
    return [
        float(dataset.num_samples) if source.weight is None else source.weight
        for source, dataset in zip(sources(data), datasets, strict=True)
    ]


def sampler_of(config: Config, datasets: Sequence[Dataset]) -> Sampler:
    """The order in which a run is shown its data; raises ValueError if they are fewer than a batch."""
    given = sources(config.data)
    return Sampler(
        datasets,
        weights=weights_of(config.data, datasets),
        names=[str(source.name) for source in given],
        seed=config.seed,
        batch_size=config.train.batch_size,
        lanes=config.data.lanes,
        window=config.data.shuffle_window,
        repeats=config.data.repeats,
    )


def loader_of(config: Config, sampler: Sampler, **options: Any) -> Loader:
    """The loader of a run; `options` are further arguments of `Loader`, or others than the configuration's."""
    data, stride = config.data, getattr(config.encoder, "stride", None)
    arguments: dict[str, Any] = {
        "draw_mask": draw_mask_for(config.method, config.views.global_size, stride, config.train.batch_size),
        "threads": data.threads,
        "prefetch": data.prefetch,
        "max_bad_share": data.max_bad_share,
        "fetch_ahead": data.cache.ahead,
        "channels": data.channels,
        "bits": data.bits,
        "executor": data.executor,
        "partial_decode": data.partial_decode,
        "dct_scaling": data.dct_scaling,
    }
    return Loader(sampler, config.views, **(arguments | options))


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


def check_ranks_agree(loader: Loader, normalisation: Normalisation, world_size: int, device: torch.device) -> None:
    """Refuse ranks whose batches would not be parts of the same ones, all of them together.

    Each rank opens the data for itself, and a file system may show a new shard to one node before the others.
    """
    sampler = loader.sampler
    facts = (loader.executor, _order_of(sampler), repr(normalisation))
    mine = torch.tensor([zlib.crc32(fact.encode()) for fact in facts], device=device)
    all_ranks = mine.new_empty(world_size * len(facts))
    dist.all_gather_into_tensor(all_ranks, mine)
    differing = (all_ranks.view(world_size, len(facts)) != mine).nonzero().tolist()
    if not differing:
        return
    rank, fact = min(differing, key=lambda found: found[1])
    raise ConfigError(
        (
            f"this rank makes crops by {loader.executor}, but rank {rank} by another executor; install the package "
            "alike on all nodes, or set data.executor=wheels",
            f"this rank is to show {sampler.summary()}, but rank {rank} something else; see to it that every node "
            "sees the same shards under data.train, and start again",
            f"this rank normalises by {normalisation}, but rank {rank} by other numbers; see to it that every node "
            "sees the same dataset.json beside the shards, or set data.mean and data.std",
        )[fact]
    )


def _order_of(sampler: Sampler) -> str:
    """All that decides which samples are shown; each node may have its copy of the data under a name of its own."""
    parts = [
        (segment.start_step, [dataclasses.replace(part, name="") for part in segment.parts])
        for segment in sampler.segments
    ]
    return repr((sampler.seed, sampler.batch_size, sampler.window, sampler.repeats, parts))
