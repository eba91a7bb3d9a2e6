"""The index of shards of which some lie elsewhere: fetched where it was published with them, else built here."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data_pipelines.remote.cache import Cache, key_of
from data_pipelines.remote.cache_folder import gigabytes
from data_pipelines.remote.remote_files import RemoteFile, Shard
from data_pipelines.remote.urls import folder_of, inside, without_query
from data_pipelines.shards.index import NO_STAMP, DamageError, Index
from data_pipelines.shards.index_format import join, read_index, store, write_joined
from data_pipelines.shards.scan import INDEX_SUFFIX, build_index, find_index, index_cache
from data_pipelines.shards.shard import identify
from data_pipelines.wording import counted

_IN_MEMORY = 2_000_000  # samples; an index of more is kept in a file that is mapped
_CONNECTIONS = 8
_TRIES = 5
_log = logging.getLogger(__name__)
#: Gives the index of one shard.
IndexSource = Callable[[], Index]


def open_remote_index(shards: Sequence[Shard], cache: Cache) -> Index:
    """The index of all the shards in this order, wherever each of them lies.

    Of a remote folder `SPLIT.index` is fetched, else `SHARD.tar.index` for each shard, else the shards themselves, of
    which one is then built and kept. What is published must fit the sizes that are known of the shards.

    Args:
        shards: The tars.
        cache: What comes from elsewhere comes through it.
    """
    joint = _joint_indexes(shards, cache)
    for index in joint.values():
        if len(index.names) == len(shards) and all(map(partial(_fits, index), range(len(shards)), shards)):
            return index
    known = _parts(shards, joint)
    parts: list[IndexSource | None] = [known.get(shard) for shard in shards]
    missing = [number for number, part in enumerate(parts) if part is None]
    first = os.getpid() % max(1, len(missing))  # ranks that start together share the work
    order = missing[first:] + missing[:first]
    told = _Notice(len(missing))
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="index") as pool:
        jobs = pool.map(lambda number: _index_of(shards[number], cache, told), order)
        for number, part in zip(order, jobs, strict=True):
            parts[number] = part
    return _joined([part for part in parts if part is not None], shards)


def published_parts(shards: Sequence[Shard], cache: Cache) -> dict[Shard, IndexSource]:
    """What the joint indexes published beside remote shards say of each."""
    return _parts(shards, _joint_indexes(shards, cache))


def _joint_indexes(shards: Sequence[Shard], cache: Cache) -> dict[str, Index]:
    """Those there are, by URL without a query."""
    found = {plain: _published(url, cache) for plain, url in _joint_urls(shards).items()}
    return {plain: index for plain, index in found.items() if index is not None}


def _parts(shards: Sequence[Shard], joint: Mapping[str, Index]) -> dict[Shard, IndexSource]:
    places = {
        (folder_of(plain), name): (index, number)
        for plain, index in joint.items()
        for number, name in enumerate(index.names)
    }
    parts: dict[Shard, IndexSource] = {}
    for shard in shards:
        if not isinstance(shard, RemoteFile):
            continue
        index, number = places.get((folder_of(without_query(shard.url)), shard.name), (None, 0))
        if index is None:
            continue
        if _fits(index, number, shard):
            parts[shard] = partial(index.part, number)
        else:
            _log.warning("%s has other bytes than its published index says; a new one is built here", shard)
    return parts


class _Notice:
    """Says once what fetching whole shards for their index costs, and how it is saved."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards, self._said = num_shards, False

    def say(self, shard: RemoteFile) -> None:
        if not self._said:
            self._said = True
            size = "" if shard.state.size is None else f", about {gigabytes(self._num_shards * shard.state.size)}"
            _log.warning(
                "no index is published beside %s, so %s%s must be fetched before anything starts; put the "
                "SPLIT.index or SHARD.tar.index that `selfsight verify` and `selfsight pack` leave beside local shards "
                "there to save that",
                shard,
                counted(self._num_shards, "shard"),
                size,
            )


def _joint_urls(shards: Sequence[Shard]) -> dict[str, str]:
    """Where joint indexes may lie: the URL, by the same without a query."""
    found: dict[str, str] = {}
    for shard in shards:
        if isinstance(shard, RemoteFile):
            url = inside(folder_of(shard.url), shard.name.rpartition("-")[0] + INDEX_SUFFIX)
            found.setdefault(without_query(url), url)
    return found


def _published(url: str, cache: Cache) -> Index | None:
    """An index that was published; None where there is none, or none that can be read."""
    for _ in range(_TRIES):
        try:
            place = cache.path(RemoteFile(url))
        except (FileNotFoundError, PermissionError):
            return None
        try:
            return read_index(place)
        except FileNotFoundError:
            continue  # another process made room of it
        except DamageError as error:
            _log.warning("%s: %s; it is built again here", RemoteFile(url), error)
            return None
    return None


def _fits(index: Index, number: int, shard: Shard) -> bool:
    return (
        isinstance(shard, RemoteFile)
        and index.names[number] == shard.name
        and shard.state.size in (None, int(index.sizes[number]))
    )


def _index_of(shard: Shard, cache: Cache, told: _Notice) -> IndexSource:
    """The index of one shard, for which no joint one was published."""
    if isinstance(shard, Path):
        found = find_index(shard, identify(shard))
        return (lambda: found) if isinstance(found, Index) else partial(read_index, found)
    index = _published(inside(folder_of(shard.url), shard.name + INDEX_SUFFIX), cache)
    if index is not None and len(index.names) == 1 and _fits(index, 0, shard) and index.is_sound():
        return lambda: index
    shard = cache.settled(shard)
    place = index_cache() / (key_of(shard)[:32] + INDEX_SUFFIX)
    try:
        stored = read_index(place)
        if len(stored.names) == 1 and _fits(stored, 0, shard) and stored.is_sound():
            return partial(read_index, place)
    except (OSError, DamageError):
        pass
    told.say(shard)
    built = _built(shard, cache)
    for problem in built.problems:
        _log.warning("%s: %s", shard, problem)
    if store(place, lambda file: write_joined(file, [lambda: built])):
        return partial(read_index, place)
    return lambda: built


def _built(shard: RemoteFile, cache: Cache) -> Index:
    for _ in range(_TRIES):
        place = cache.path(shard)
        try:
            built = build_index(place)
        except FileNotFoundError:
            continue  # another process made room of it
        return replace(built, names=(shard.name,), stamps=np.array([NO_STAMP]))
    raise OSError(
        f"{shard} is removed from the cache before it can be looked at; raise data.cache.max_bytes, or start fewer jobs"
    )


def _joined(parts: Sequence[IndexSource], shards: Sequence[Shard]) -> Index:
    digest, num_samples = hashlib.sha256(), 0
    for part, shard in zip(parts, shards, strict=True):
        index = part()
        num_samples += len(index)
        digest.update(f"{shard.name}\0{index.digest(0)}\0{int(index.sizes[0])}\0".encode("utf-8", "surrogateescape"))
    if num_samples > _IN_MEMORY:
        place = index_cache() / (digest.hexdigest()[:32] + INDEX_SUFFIX)
        if place.is_file() or store(place, lambda file: write_joined(file, parts)):
            return read_index(place)
    return join([part() for part in parts])
