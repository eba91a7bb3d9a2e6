"""The data sets that a run is shown, and in which order (imports no torch, so that what is missing is told at once)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePath

from data_pipelines.datasets.bad_samples import check_losses
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.narrowed import only
from data_pipelines.images.depth import depth_warning
from data_pipelines.remote.cache import Cache, default_folder
from data_pipelines.remote.fetch import Patience
from data_pipelines.remote.urls import redact
from data_pipelines.sampler import Sampler
from pretrain.config import Config
from pretrain.config.sections import DataConfig, SourceConfig
from pretrain.methods.registry import spec_of

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


def training_datasets(config: Config) -> tuple[Dataset, ...]:
    """The data sets that a run is shown, without the samples that its method can't learn from, such as those without
    a label; one of which that is so of all samples stays whole. Raises as `open_datasets` does."""
    datasets = open_datasets(config.data)
    wanted = [spec_of(config.method).call("learns_from", config, dataset) for dataset in datasets]
    return tuple(
        dataset if which is None or which.all() or not which.any() else only(dataset, which)
        for dataset, which in zip(datasets, wanted, strict=True)
    )


def data_lines(config: Config, datasets: Sequence[Dataset]) -> list[str]:
    """What to tell of the data when a run begins: training shards named with held-out ones, as `*.tar` of a folder
    does, grey levels that a run of fewer bits loses, as far as `dataset.json` tells, and how many samples are left
    out."""
    data = config.data
    lines = list(spec_of(config.method).call("left_out", config) or ())
    for source, dataset in zip(sources(data), datasets, strict=True):
        splits = {shard.name.partition("-")[0].removesuffix(".tar") for shard in dataset.shards}
        others = sorted(splits & set(_HELD_OUT))
        if "train" in splits and others:
            lines.append(
                f"{redact(source.path)} names shards of {' and '.join(others)} beside those of train, and the run "
                "learns from all of them; a folder's name stands for its train shards only"
            )
        warning = dataset.depth and depth_warning(*dataset.depth, data.bits)
        if warning:
            lines.append(f"{redact(source.path)}: {warning}")
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
        repeats=config.data.repeated_augmentation,
    )
