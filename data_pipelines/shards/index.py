"""Where every sample lies in one shard, so that any of them is one read away.

An index is built once per shard from the tar's headers and kept beside the shard, or in the user's cache
when that folder is read-only. It is rebuilt when the shard's size or time of change differs.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from data_pipelines.shards.index_format import read_index, store, write_joined
from data_pipelines.shards.sample_index import Index
from data_pipelines.shards.sections import DamageError
from data_pipelines.shards.shard import Identity, identify
from data_pipelines.shards.shard_scan import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from data_pipelines.shards.shard_scan import scan_shard

INDEX_SUFFIX = ".index"
_log = logging.getLogger(__name__)


def build_index(shard: Path) -> Index:
    """Read a shard's headers and labels; what a sample is, says `scan_shard`."""
    return scan_shard(shard)[0]


def load_index(shard: Path) -> Index:
    """The stored index of a shard, or a new one, which is then stored where that is possible."""
    found = find_index(shard, identify(shard))
    return found if isinstance(found, Index) else read_index(found)


def find_index(shard: Path, identity: Identity, *, thorough: bool = True) -> Path | Index:
    """The file of a shard's index, built if there is none; the index itself where there is no place for a file.

    Args:
        shard: The tar.
        identity: Of the tar as it is now.
        thorough: Look at every entry of a stored index, not at its tables only.
    """
    places = _places(shard, identity)
    for place in places:
        try:
            index = read_index(place)
        except (OSError, DamageError):
            continue
        if len(index.names) == 1 and fits(index, 0, shard, identity) and (not thorough or index.is_sound()):
            return place
    index = build_index(shard)
    for problem in index.problems:
        _log.warning("%s: %s", shard, problem)
    for place in places:
        if store(place, lambda file: write_joined(file, [lambda: index])):
            return place
    _log.warning("no place to keep the index of %s; set SELFSIGHT_CACHE to a folder that can be written to", shard)
    return index


def fits(index: Index, number: int, shard: Path, identity: Identity) -> bool:
    """Whether shard `number` of a stored index is `shard`, unchanged."""
    stored = index.identity(number)
    same_stamp = identity.stamp is None or stored.stamp is None or identity.stamp == stored.stamp
    return index.names[number] == shard.name and stored.size == identity.size and same_stamp


def _places(shard: Path, identity: Identity) -> tuple[Path, Path]:
    """Beside the shard, then in the user's cache under a name that holds the shard's path, size and time."""
    text = f"{shard.resolve()}\0{identity.size}\0{identity.stamp}".encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(text).hexdigest()
    return shard.with_name(shard.name + INDEX_SUFFIX), index_cache() / (digest[:32] + INDEX_SUFFIX)


def index_cache() -> Path:
    """The folder of the user's own in which indexes are kept that have no place beside their shards."""
    cache = Path(os.environ.get("SELFSIGHT_CACHE") or Path.home() / ".cache" / "selfsight")
    return cache / "index"
