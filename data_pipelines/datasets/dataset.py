"""A data set of shards: the samples numbered through, and any of them read by its number."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np

from data_pipelines.datasets.dataset_index import joint_place, open_index
from data_pipelines.datasets.locations import Locations, Spec
from data_pipelines.datasets.open_file import OpenFile
from data_pipelines.files import parse_json
from data_pipelines.images.issues import shown
from data_pipelines.images.pixels import MAX_FILE_BYTES
from data_pipelines.images.sample import Sample
from data_pipelines.remote.remote_files import FileState, RemoteFile, Shard, mtime_version
from data_pipelines.retry import patiently
from data_pipelines.shards.index import NO_LABEL, Index
from data_pipelines.shards.scan import IMAGE_SUFFIXES
from data_pipelines.shards.shard import ShardChangedError, identify
from data_pipelines.shards.stack_part import frames_in
from data_pipelines.shards.tar import BLOCK
from data_pipelines.wording import counted

if TYPE_CHECKING:  # imported where shards come through it
    from data_pipelines.remote.cache import Cache

_MAX_OPEN_SHARDS = 512  # of a data set
_MIN_OPEN_SHARDS = 8
_MAX_NAMED = 5  # empty shards
_HAS_ADVICE = hasattr(os, "posix_fadvise")  # not on every system
_log = logging.getLogger(__name__)


class Dataset:
    """Samples 0 .. num_samples - 1 over a list of shards; safe to read from any number of threads.

    Args:
        shards: The tars, in the order in which their samples are numbered.
        info: What `dataset.json` says, if there is one.
        joint: Where the joint index of these shards lies, if not in the user's cache.
        cache: Through which shards from elsewhere come.
        stage: Let local shards come through it too, as their file system is slow.
        index: Of these shards, where it is at hand; no shard is looked at then, and nothing told of what it says.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        info: dict | None = None,
        joint: Path | None = None,
        cache: Cache | None = None,
        stage: bool = False,
        index: Index | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self._given_cache, self.stage = cache, stage
        local = [shard for shard in self.shards if isinstance(shard, Path)]
        self.fetches = stage or len(local) < len(self.shards)
        self.index = index or (
            open_index(local, joint) if len(local) == len(self.shards) else self._open_remote_index()
        )
        self.shard_sizes: tuple[int, ...] = tuple(self.index.counts.tolist())
        self.num_samples = len(self.index)
        self._ends: list[int] = self.index.ends.tolist()
        if not self.num_samples:
            raise ValueError(
                f"no sample in {counted(len(self.shards), 'shard')}, the first of them {self.shards[0]}; "
                f"a sample is a member that ends in .{', .'.join(IMAGE_SUFFIXES)}"
            )
        info = info or {}
        self.mean: tuple[float, ...] | None = _tuple(info.get("mean"))  # per channel, of pixels in 0 .. 1
        self.std: tuple[float, ...] | None = _tuple(info.get("std"))
        self.classes: tuple[str, ...] | None = _tuple(info.get("classes"))
        self.mask_names: dict[int, str] = {int(level): name for level, name in (info.get("mask_names") or {}).items()}
        self.group_key: str | None = (info.get("groups") or {}).get("key")  # the field by which pack kept groups apart
        self.depth = _depth(info)  # bits a channel, and the largest level, as far as dataset.json tells
        self.packed = _packed(info)  # samples by shard's name, as far as dataset.json tells
        self.labels = self.index.labels  # (num_samples,) int32 or int64, -1 where unknown; perhaps a view of a file
        self._open: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = Lock()
        _datasets.add(self)
        if index is None:
            self._tell()

    def _tell(self) -> None:
        """Log what is wrong with the shards."""
        if self.index.findings:
            num_problems, num_shards = len(self.index.findings), len(self.shards)
            _log.warning("%d of %d shards have problems; `selfsight verify` lists them", num_problems, num_shards)
        empty = [str(shard) for shard, size in zip(self.shards, self.shard_sizes, strict=True) if not size]
        if empty:
            more = f" and {len(empty) - _MAX_NAMED} more" if len(empty) > _MAX_NAMED else ""
            _log.warning("without a sample: %s%s", ", ".join(map(shown, empty[:_MAX_NAMED])), more)

    @cached_property
    def cache(self) -> Cache:
        """Through which shards come, of those that do."""
        from data_pipelines.remote.cache import Cache, default_folder

        return self._given_cache or Cache(default_folder(self.stage))

    def _open_remote_index(self) -> Index:
        from data_pipelines.datasets.remote_index import open_remote_index

        return open_remote_index(self.shards, self.cache)

    @cached_property
    def checksum(self) -> str:
        """A hash over the shards' names and digests: equal where the samples and their numbers are."""
        digest = hashlib.sha256()
        for number, name in enumerate(self.index.names):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + self.index.digest(number).encode())
        return digest.hexdigest()

    @property
    def state(self) -> str:
        """A hash over sizes and times of the shards of this disk, which `checksum` leaves out: another one after any of
        them was written to, be names and lengths of its members as before, and after a copy of a new time."""
        digest = hashlib.sha256(self.checksum.encode())
        for shard in self.shards:
            if isinstance(shard, Path):
                status = shard.stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    @property
    def num_image_bytes(self) -> int:
        """Of all images, as stored."""
        return int(self.index.image_bytes.sum())

    def shards_of(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """The numbers of the shards that hold these samples."""
        return np.searchsorted(self.index.ends, samples, side="right")

    def key(self, sample: int) -> tuple[str, Shard]:
        """The key and the shard of a sample."""
        shard, row = self._locate(sample)
        return self.index.entry(shard, row).key, self.shards[shard]

    def read(self, sample: int) -> Sample:
        """Read one sample.

        Raises:
            IndexError: `sample` is not one of 0 .. num_samples - 1.
            DamageError: The stored index says of it what cannot be.
            OSError: The file system goes on failing, see `patiently`; that is no property of the sample, so nobody
                should skip it. Or the shard has shrunk.
        """
        shard, row = self._locate(sample)
        entry = self.index.entry(shard, row)
        size = min(entry.image_size, MAX_FILE_BYTES + 1)  # of what is larger, as much as tells that it is
        image = self._read_piece(shard, entry.image_offset, size)
        frames = frames_in(image, entry.key)
        image = frames[0] if frames else image
        return Sample(entry.key, self.shards[shard], image, None if entry.label == NO_LABEL else entry.label, frames)

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Have the kernel begin to read the images of these samples, for whoever reads them soon.

        A file system that is slow to answer is asked for all of them at once, and not for as many as there are
        threads. Of shards that come through a cache, only those that are here and open are read. Nothing is raised.
        """
        if not _HAS_ADVICE:
            return
        numbers = np.asarray(samples)
        sizes, blocks = self.index.image_sizes[numbers].tolist(), self.index.image_blocks[numbers].tolist()
        for shard, block, size in sorted(zip(self.shards_of(numbers).tolist(), blocks, sizes, strict=True)):
            with suppress(OSError):
                file = self._file(shard) if not self.fetches else self._open.get(shard)
                if file is not None:
                    os.posix_fadvise(file.descriptor, block * BLOCK, size, os.POSIX_FADV_WILLNEED)

    def read_metadata(self, sample: int) -> dict[str, Any]:
        """What the `.json` of a sample says; empty where it has none.

        Raises:
            ValueError: It is no JSON object.
            IndexError, DamageError, OSError: As of `read`.
        """
        stored = self.read_beside(sample, "json")
        if stored is None:
            return {}
        try:
            found = parse_json(stored)
            if not isinstance(found, dict):
                raise ValueError(f"it is a {type(found).__name__}")
        except ValueError as error:
            key, shard = self.key(sample)
            raise ValueError(f"the .json of {key} in {shard} is no JSON object: {error}") from error
        return found

    def read_beside(self, sample: int, kind: str) -> bytes | None:
        """The bytes of what lies beside the image of a sample, of `shards.index.BESIDE`; None where nothing does.

        For masks and depths there is `datasets.maps`. Raises IndexError, DamageError and OSError as `read` does.
        """
        shard, row = self._locate(sample)
        offset, size = self.index.beside(kind, shard, row)
        return self._read_piece(shard, offset, min(size, MAX_FILE_BYTES + 1)) if size else None

    def _read_piece(self, shard: int, offset: int, size: int) -> bytes:
        def read() -> bytes:
            file = self._file(shard)  # held for as long as it is read
            return os.pread(file.descriptor, size, offset)

        piece = patiently(self.shards[shard], "reading", read, self.close)
        if len(piece) < size:
            raise ShardChangedError(self.shards[shard], "has shrunk")
        return piece

    def check_unchanged(self, sample: int) -> None:
        """Raise ShardChangedError if the shard of a sample has another size or time of change than its index."""
        shard, _ = self._locate(sample)
        place = self.shards[shard]
        if self.fetched(shard) is not None or isinstance(place, RemoteFile):
            return  # the cache has checked it, and nobody writes there
        now, indexed = identify(place), self.index.identity(shard)
        if now.size != indexed.size or (now.stamp != indexed.stamp and None not in (now.stamp, indexed.stamp)):
            raise ShardChangedError(place, "has changed")

    def over(self, shards: Sequence[Shard], index: Index | None = None) -> Dataset:
        """A data set of other shards, or of these by another `index`, that is read in the same way."""
        cache = self.cache if self.fetches else self._given_cache
        return Dataset(shards, cache=cache, stage=self.stage, index=index)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        with self._lock:
            self._open.clear()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of a data set of {self.num_samples}")
        shard = bisect_right(self._ends, sample)  # of a list: four times as fast as NumPy for one number
        return shard, sample - self._ends[shard] + self.shard_sizes[shard]

    def fetched(self, shard: int) -> RemoteFile | None:
        """What must come through the cache before shard number `shard` can be read; None: nothing."""
        found = self.shards[shard]
        size = int(self.index.sizes[shard])
        if isinstance(found, RemoteFile):
            return replace(found, state=replace(found.state, size=size))
        if self.stage:
            stamp = self.index.identity(shard).stamp
            return RemoteFile(str(found.resolve()), FileState(size, None if stamp is None else mtime_version(stamp)))
        return None

    def _file(self, shard: int) -> OpenFile:
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                file.keep()
                return file
        # not under the lock: it may have to be fetched, and others are there already
        fetched = self.fetched(shard)
        file = OpenFile(self.shards[shard], fetched, None if fetched is None else self.cache)
        with self._lock:
            self._open[shard] = file
            for number in [number for number, other in self._open.items() if other.is_removed()]:
                del self._open[number]  # else its room on the disk would not come free
            while len(self._open) > _most_open():
                self._open.popitem(last=False)
        return file


_datasets: WeakSet[Dataset] = WeakSet()  # of this process


def _most_open() -> int:
    """Shards that each data set may keep open: together half of the files that the process may have, often 1,024."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_OPEN_SHARDS
    return min(_MAX_OPEN_SHARDS, max(_MIN_OPEN_SHARDS, limit // 2 // max(1, len(_datasets))))


def open_dataset(spec: Spec, split: str = "train", *, cache: Cache | None = None, stage: bool = False) -> Dataset:
    """Open the shards that `spec` names.

    Args:
        spec: A folder, of which `{split}-*.tar` is taken in the order of the names; or a path with
            `*`, `?` or `[...]` in it; or one with braces such as `x-{000..009}.tar`; or one tar; or any of these at a
            URL; or a list of such.
        split: Of a folder only.
        cache: Through which shards from elsewhere come; default: one in its usual place.
        stage: Let local shards come through it too.

    Raises:
        FileNotFoundError: There are no such shards; the message says what there is.
        ValueError: A shard is named twice, or no shard holds a sample.
        OSError: A place elsewhere cannot be reached; see `fetch.pieces`.
    """
    locations = Locations(cache, stage)
    shards = locations.find(spec, split)
    repeated = [shard for shard, count in Counter(shards).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} is named more than once; name every shard once")
    folder = Path(spec).expanduser() if isinstance(spec, str | Path) else None
    joint = joint_place(folder, split) if folder is not None and folder.is_dir() else None
    if stage or any(isinstance(shard, RemoteFile) for shard in shards):
        cache = locations.cache
    return Dataset(shards, locations.describe(shards[0]), joint, cache, stage)


def find_shards(spec: Spec, split: str = "train", cache: Cache | None = None) -> list[Shard]:
    """The tars that `spec` names, in order; see `open_dataset`."""
    return Locations(cache).find(spec, split)


def _packed(info: dict) -> dict[str, int]:
    try:
        return {shard["name"]: int(shard["samples"]) for split in info["splits"].values() for shard in split["shards"]}
    except (KeyError, TypeError, AttributeError, ValueError):  # none that `selfsight pack` wrote
        return {}


def _depth(info: dict) -> tuple[int, int] | None:
    try:
        bits = int(info["statistics"]["bits"])
        return bits, round(max(info["statistics"]["max"]) * ((1 << bits) - 1))
    except (KeyError, TypeError, ValueError):  # none were measured
        return None


def _tuple(values: list | None) -> tuple | None:
    return None if values is None else tuple(values)
