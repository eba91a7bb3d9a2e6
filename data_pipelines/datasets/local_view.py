"""Shards from elsewhere as local files under their own names, a few at a time, for who reads every byte once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.datasets.description import DESCRIPTION
from data_pipelines.datasets.locations import Locations
from data_pipelines.datasets.remote_index import published_parts
from data_pipelines.files import lock, write_json
from data_pipelines.remote.cache import Cache
from data_pipelines.remote.remote_files import RemoteFile, Shard
from data_pipelines.remote.urls import folder_of, without_query
from data_pipelines.shards.index import NO_STAMP, Index
from data_pipelines.shards.index_format import write_joined
from data_pipelines.shards.scan import INDEX_SUFFIX

_LOCK = "lock"


class LocalView:
    """A folder beside the cache in which shards appear by `bring` and hold no room any more after `release`.

    What was published beside them, `dataset.json` and indexes, lies beside them too. A shard that is released leaves
    an empty file of its size and time behind, so that its index still fits. Local shards stay where they are.

    Args:
        shards: What is looked at.
        cache: Through which it comes.
        whole: These are all the shards of their folders; else what else is described there counts as being there.
    """

    def __init__(self, shards: Sequence[Shard], cache: Cache, *, whole: bool) -> None:
        self._cache = cache
        self._files: dict[Path, RemoteFile] = {}
        self._folder: Path | None = None
        self._numbers: dict[str, int] = {}  # of remote folders
        self.paths = [shard for shard in shards if isinstance(shard, Path)]
        if len(self.paths) == len(shards):
            return
        parent = cache.folder.path.parent / "views"
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left(parent)
        self._folder, self._turn = _own_folder(parent)
        self.paths = [shard if isinstance(shard, Path) else self._place(shard) for shard in shards]
        self._publish(shards, whole)

    def bring(self, path: Path) -> None:
        """Have the bytes of a shard at its path; raises as `Cache.open` does."""
        file = self._files.get(path)
        if file is not None:
            path.unlink(missing_ok=True)
            try:
                self._cache.link(file, path)
            except FileNotFoundError:
                raise
            except OSError:
                path.touch()  # it is there, and cannot be had
                raise

    def release(self, path: Path) -> None:
        """The bytes are needed no more."""
        if path not in self._files or not path.exists():
            return
        status = path.stat()
        path.unlink()
        path.touch()
        os.truncate(path, status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._turn.close()

    def __enter__(self) -> LocalView:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _place(self, shard: RemoteFile) -> Path:
        """Where a shard will lie: with those of its own folder, as two folders may have shards of one name."""
        assert self._folder is not None
        number = self._numbers.setdefault(folder_of(without_query(shard.url)), len(self._numbers))
        path = self._folder / str(number) / shard.name
        path.parent.mkdir(exist_ok=True)
        self._files[path] = shard
        path.touch()
        os.truncate(path, shard.state.size or 0)
        return path

    def _publish(self, shards: Sequence[Shard], whole: bool) -> None:
        locations, parts = Locations(self._cache), published_parts(shards, self._cache)
        for folder, file in {path.parent: file for path, file in self._files.items()}.items():
            description = locations.describe(file)
            if description is not None:
                write_json(folder / DESCRIPTION, description)
                for name in () if whole else locations.names_beside(file):
                    (folder / name).touch()
        for path, file in self._files.items():
            if file in parts:
                index = replace(parts[file](), stamps=np.array([NO_STAMP]))
                with path.with_name(path.name + INDEX_SUFFIX).open("wb") as out:
                    write_joined(out, [partial(_itself, index)])


def _itself(index: Index) -> Index:
    return index


def _own_folder(parent: Path) -> tuple[Path, BinaryIO]:
    """A new folder and its lock, which is held; one that another process took for left behind does not count."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent))
        place = folder / _LOCK
        turn = place.open("wb")
        if lock(turn) and place.exists():
            return folder, turn
        turn.close()


def _remove_left(parent: Path) -> None:
    """Remove the folders of processes that were killed."""
    for folder in parent.iterdir():
        with suppress(OSError), (folder / _LOCK).open("r+b") as turn:
            if lock(turn):
                shutil.rmtree(folder)
