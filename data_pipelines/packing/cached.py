"""Images packed into a cache, so that a run or a probe may name them: packed once, and again where they change."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.files import lock, read_json
from data_pipelines.packing.grouping import NO_GROUPS, Grouping
from data_pipelines.packing.sources.base import ANY_COLUMNS, Columns, Source
from data_pipelines.packing.sources.opening import open_source
from data_pipelines.packing.write import pack
from data_pipelines.remote.cache import default_folder

_MAX_NAME = 40
_OPTIONS_HERE = {"--data", "--val-share", "--group-pattern", "--group-column"}  # which `pretrain` and `probe` have
_MUCH = 10**9  # bytes of earlier packs, from which on they are told of
_POLL_SECONDS = 0.5


class Packed(NamedTuple):
    """Shards of images: where, whether they were there already, and what `dataset.json` says of them."""

    folder: Path
    reused: bool
    info: dict[str, Any]


def pack_cached(
    images: str | Path,
    grouping: Grouping = NO_GROUPS,
    *,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Packed:
    """Shards of `images` in the cache, packed now or by an earlier call on the same images with the same grouping.

    Images are the same whose names, sizes, labels and times of change are. The cache is `packed/` in SELFSIGHT_CACHE,
    or else in ~/.cache/selfsight; what no run uses may be removed from it. Of several processes one packs and the
    others wait.

    Raises what `pack` raises; ValueError also for a share or a grouping that does not fit the images.
    """
    try:
        return _pack_cached(images, grouping, progress, say)
    except ValueError as error:
        elsewhere = set(re.findall(r"--[a-z-]+", str(error))) - _OPTIONS_HERE
        if not elsewhere:
            raise
        raise ValueError(
            f"{error}. ({', '.join(sorted(elsewhere))}: of `selfsight pack IMAGES SHARDS`; then give --data SHARDS)"
        ) from error


def _pack_cached(images: str | Path, grouping: Grouping, progress: bool, say: Callable[[str], None]) -> Packed:
    columns = ANY_COLUMNS._replace(group=grouping.group_column)
    packed_folder().mkdir(parents=True, exist_ok=True)
    with closing(open_source(images, packed_folder(), columns=columns, group_pattern=grouping.group_pattern)) as source:
        return _pack_listed(images, grouping, columns, source, progress, say)


def packed_folder() -> Path:
    """Where packed images are kept."""
    return default_folder().with_name("packed")


def _pack_listed(
    images: str | Path, grouping: Grouping, columns: Columns, source: Source, progress: bool, say: Callable[[str], None]
) -> Packed:
    out = packed_folder() / f"{_plain(images)}-{_digest(images, grouping, source)}"
    with _turn(out.with_suffix(".lock"), say):
        info = read_json(out / "dataset.json")
        if info is not None:
            say(f"{images} is unchanged since it was packed into {out}")
            return Packed(out, True, info)
        say(f"packing {images} into {out}")
        taken = sum(shard.stat().st_size for shard in packed_folder().glob("*/*.tar"))
        if taken > _MUCH:
            say(f"earlier packs take {taken / 1e9:.1f} GB in {packed_folder()}; delete those that no run uses")
        info = pack(
            images,
            out,
            columns=columns,
            group_pattern=grouping.group_pattern,
            val_share=grouping.val_share,
            progress=progress,
            source=source,
        )
    return Packed(out, False, info)


def _plain(images: str | Path) -> str:
    """The images' name as part of a folder's, for people."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(images).expanduser().resolve().name).strip("-")
    return name[:_MAX_NAME] or "images"


def _digest(images: str | Path, grouping: Grouping, source: Source) -> str:
    told = json.dumps([source.listing.fingerprint, source.kind, *grouping])
    return hashlib.sha256(told.encode() + _times(images, source)).hexdigest()[:16]


def _times(images: str | Path, source: Source) -> bytes:
    """When each file was last changed: the list, where `images` is one, and all that an image is read from."""
    paths = itertools.chain([Path(images).expanduser()], source.files())
    files = (path for path, _ in itertools.groupby(paths))  # frames of one file come one after the other
    return np.array([path.stat().st_mtime_ns if path.is_file() else 0 for path in files], dtype=np.int64).tobytes()


@contextmanager
def _turn(place: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file, after whoever holds it."""
    with place.open("a") as file:
        told = False
        while not lock(file):
            if not told:
                say(f"another process is packing into {place.with_suffix('')}; waiting for it")
            told = True
            time.sleep(_POLL_SECONDS)
        yield
