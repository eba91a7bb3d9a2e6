"""One index for a whole list of shards, kept as one file so that ten thousand of them open at once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path

from data_pipelines.files import lock
from data_pipelines.shards.index import DamageError, Index
from data_pipelines.shards.index_format import join, may_write, read_index, store, write_joined
from data_pipelines.shards.scan import INDEX_SUFFIX, find_index, fits, index_cache
from data_pipelines.shards.shard import Identity, identify_all

_MANY_SHARDS = 64  # from here on a list of shards gets a joint index of its own when it is first opened
_MANY_SAMPLES = 2_000_000
_THREADS = 8
_POLL_SECONDS = 0.5
_log = logging.getLogger(__name__)


def open_index(shards: Sequence[Path], place: Path | None = None) -> Index:
    """The index of all the shards in this order; what is missing of it is built, and stored where that is possible.

    Ranks that start together share the building of shards' indexes, and one of them joins them.

    Args:
        shards: The tars.
        place: Where their joint index lies, if it is not in the user's cache.
    """
    identities = identify_all(shards)
    places = [*([place] if place is not None else []), _cached_place(shards)]
    index = _stored(places, shards, identities)
    if index is not None:
        return index
    if len(shards) < _MANY_SHARDS:
        parts = [source() for source in _sources(shards, identities, places)]
        if len(parts) == 1:
            return parts[0]
        if sum(map(len, parts)) < _MANY_SAMPLES:
            return join(parts)
    return _join_once(shards, identities, places)


def write_index(folder: Path, split: str) -> Path | None:
    """Write the joint index of a folder's split, `{split}.index`; None where that is not permitted.

    For the end of a pack; a folder without one gets it when it is first opened, if it has many shards.
    """
    shards = sorted(folder.glob(f"{split}-*.tar"))
    place, identities = joint_place(folder, split), identify_all(shards)
    if _stored([place], shards, identities) is not None:
        return place
    sources = _sources(shards, identities, [place])
    return place if store(place, lambda file: write_joined(file, sources)) else None


def joint_place(folder: Path, split: str) -> Path:
    """Where the joint index of a folder's split lies."""
    return folder / f"{split}{INDEX_SUFFIX}"


def is_true(place: Path, shard: Path, fresh: Index) -> bool:
    """Whether a joint index, if it is there and knows the shard as it is, says of its samples what the shard does."""
    try:
        index = _opened(place, place.stat().st_mtime_ns)
        number = index.names.index(shard.name)
    except (OSError, DamageError, ValueError):
        return True  # of no use, so that nobody uses it
    if not fits(index, number, shard, fresh.identity(0)):
        return True
    part = index.part(number)
    return part.digest(0) == fresh.digest(0) and part.is_sound()


@lru_cache(maxsize=4)
def _opened(place: Path, stamp: int) -> Index:
    return read_index(place)


def _cached_place(shards: Sequence[Path]) -> Path:
    """In the user's cache, under a name that holds the shards' paths."""
    folder = cache(Path.resolve)  # one look-up for each folder: resolving every shard takes seconds
    text = "\0".join(f"{folder(shard.parent)}/{shard.name}" for shard in shards)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return index_cache() / (digest[:32] + INDEX_SUFFIX)


def _stored(places: Sequence[Path], shards: Sequence[Path], identities: Sequence[Identity]) -> Index | None:
    """The first joint index that is of these shards as they are."""
    for place in places:
        index = _read(place)
        if index is not None and len(index.names) == len(shards):
            numbered = enumerate(zip(shards, identities, strict=True))
            if all(fits(index, number, shard, identity) for number, (shard, identity) in numbered):
                return index
    return None


def _read(place: Path) -> Index | None:
    try:
        return read_index(place)
    except FileNotFoundError:
        return None
    except (OSError, DamageError) as error:
        _log.warning("%s; it is built again", error)
        return None


def _sources(
    shards: Sequence[Path], identities: Sequence[Identity], places: Sequence[Path], thorough: bool = True
) -> list[Callable[[], Index]]:
    """What gives the index of each shard: its own file, or an earlier joint index that knew fewer or other shards."""
    earlier: dict[tuple[str, int, int | None], Callable[[], Index]] = {}
    folders = {joint_place(shard.parent, shard.name.rpartition("-")[0]) for shard in shards}
    for index in map(_read, [*folders, *reversed(places)]):
        if index is not None and len(set(index.names)) == len(index.names):
            earlier |= {
                (name, *index.identity(number)): partial(index.part, number) for number, name in enumerate(index.names)
            }

    def source(number: int) -> Callable[[], Index]:
        shard, identity = shards[number], identities[number]
        known = earlier.get((shard.name, *identity))
        if known is not None and (not thorough or known().is_sound()):
            return known
        found = find_index(shard, identity, thorough=thorough)
        return (lambda: found) if isinstance(found, Index) else partial(read_index, found)

    # ranks that start together begin at different shards, so that they share the building of new indexes
    first = os.getpid() % len(shards)
    numbers = [*range(first, len(shards)), *range(first)]
    with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
        made = dict(zip(numbers, pool.map(source, numbers), strict=True))
    return [made[number] for number in range(len(shards))]


def _join_once(shards: Sequence[Path], identities: Sequence[Identity], places: Sequence[Path]) -> Index:
    """The joint index, written by one of the processes that open these shards at the same time."""
    _sources(shards, identities, places, thorough=False)  # each process helps to build what is missing
    for place in places:
        if not may_write(place.parent):
            continue
        turn = place.with_name(f".{place.name}.lock")
        with turn.open("ab") as file:
            while not lock(file):
                time.sleep(_POLL_SECONDS)
            try:
                index = _stored([place], shards, identities)  # by now another may have written it
                if index is not None:
                    return index
                sources = _sources(shards, identities, places)
                if store(place, lambda file, sources=sources: write_joined(file, sources)):  # type: ignore[misc]
                    return read_index(place)
            finally:
                turn.unlink(missing_ok=True)
    _log.warning(
        "no place to keep a joint index of %d shards; set SELFSIGHT_CACHE to a folder to write to", len(shards)
    )
    return join([source() for source in _sources(shards, identities, places)])
