"""All that the batches of a loader depend on, as JSON and open files, and what makes them again from these."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from data_pipelines.datasets.account import BadSampleAccount
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.files import in_memory
from data_pipelines.remote.remote_files import FileState, RemoteFile, Shard
from data_pipelines.rng import DrawFields, NamedDraw
from data_pipelines.rows import Making, RowMaker
from data_pipelines.sampler import Sampler
from data_pipelines.shards.index_format import mapped_index, write_joined
from data_pipelines.transforms.config import Views

Json = dict[str, Any]


class State:
    """What a child is told of its loader: open `files`, of which the first says what the others are.

    Raises:
        ValueError: `draw` is a function of this process alone.
    """

    def __init__(self, sampler: Sampler, making: Making, draw: DrawFields | None, threads: int) -> None:
        self.files: list[int] = []
        named = _named(draw)
        self._keep("state").close()  # in the first place
        told = {
            "sampler": sampler.state(),
            "making": asdict(making) | {"views": TypeAdapter(Views).dump_python(making.views, mode="json")},
            "draw": named,
            "threads": threads,
            "datasets": {str(key): self._dataset(dataset) for key, dataset in sampler.datasets.items()},
        }
        os.pwrite(self.files[0], json.dumps(told).encode(), 0)
        #: Modules that a child will need beside this package.
        self.imports: list[str] = [] if named is None else [_module(named)]

    def close(self) -> None:
        for descriptor in self.files:
            os.close(descriptor)
        self.files.clear()

    def _keep(self, name: str) -> BinaryIO:
        """A file without a name, and in memory."""
        descriptor = in_memory(name)
        self.files.append(descriptor)
        return os.fdopen(os.dup(descriptor), "r+b")

    def _dataset(self, dataset: Dataset) -> Json:
        index = dataset.index
        if index.file is not None:
            self.files.append(os.dup(index.file.fileno()))
        else:
            with self._keep("index") as file:
                write_joined(file, [lambda: index])
        place = len(self.files) - 1
        cache = None
        if dataset.fetches:
            patience = asdict(dataset.cache.patience)
            folder = os.fspath(dataset.cache.folder.path.absolute())
            cache = {"folder": folder, "max_bytes": dataset.cache.max_bytes, "patience": patience}
        shards = [_shard(shard) for shard in dataset.shards]
        return {"shards": shards, "stage": dataset.stage, "cache": cache, "index": place}


def maker_of(files: Sequence[int], account: Callable[[int, Dataset], BadSampleAccount]) -> RowMaker:
    """What the files of a `State` tell of, wherever they are open."""
    told = json.loads(os.pread(files[0], os.fstat(files[0]).st_size, 0))
    caches: dict[str, Any] = {}
    datasets = {int(key): _opened(entry, files, caches) for key, entry in told["datasets"].items()}
    views = TypeAdapter(Views).validate_python(told["making"].pop("views"))
    return RowMaker(
        Sampler.continued(told["sampler"], datasets),
        Making(views=views, **told["making"]),
        {key: account(key, dataset) for key, dataset in datasets.items()},
        None if told["draw"] is None else _made(told["draw"]),
        told["threads"],
    )


def _shard(shard: Shard) -> str | Json:
    if isinstance(shard, Path):
        return os.fspath(shard.absolute())
    return {"url": shard.url, "size": shard.state.size, "version": shard.state.version, "sha256": shard.sha256}


def _opened(told: Json, files: Sequence[int], caches: dict[str, Any]) -> Dataset:
    shards: list[Shard] = [
        Path(shard)
        if isinstance(shard, str)
        else RemoteFile(shard["url"], FileState(shard["size"], shard["version"]), shard["sha256"])
        for shard in told["shards"]
    ]
    index = mapped_index(files[told["index"]], "the index of the loader")
    return Dataset(shards, cache=_cache(told["cache"], caches), stage=told["stage"], index=index)


def _cache(told: Json | None, caches: dict[str, Any]) -> Any:
    """One for all data sets that share it."""
    if told is None:
        return None
    from data_pipelines.remote.cache import Cache
    from data_pipelines.remote.fetch import Patience

    key = json.dumps(told)
    if key not in caches:
        caches[key] = Cache(Path(told["folder"]), told["max_bytes"], Patience(**told["patience"]))
    return caches[key]


def _named(draw: DrawFields | None) -> Json | None:
    """By what another process finds a function: the name that it says, or the one under which its module has it."""
    if draw is None:
        return None
    if isinstance(draw, NamedDraw):
        return {"maker": draw.maker, "given": draw.given}
    name = f"{getattr(draw, '__module__', '')}:{getattr(draw, '__qualname__', '')}"
    if "<" in name or name.startswith((":", "__main__:")) or name.endswith(":"):
        raise ValueError(
            f"{draw!r} is known in this process only, and batches are to be made by others; give a rng.NamedDraw or a "
            "function of a module, or workers=0"
        )
    return {"function": name}


def _module(told: Mapping[str, Any]) -> str:
    name: str = told.get("function") or told["maker"]
    return name.partition(":")[0]


def _made(told: Mapping[str, Any]) -> DrawFields:
    if "function" in told:
        found: DrawFields = resolve_name(told["function"])
        return found
    return NamedDraw(told["maker"], told["given"])
