"""A data set of shards: the samples numbered through, and any of them read by its number."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand

from data_pipelines.joint_index import joint_place, open_index
from data_pipelines.sample_index import NO_LABEL
from data_pipelines.shards import ShardChangedError, identify, open_shard
from data_pipelines.steady import steadily

_MAX_OPEN_SHARDS = 512  # a process may often have 1024 files open in all
_log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One sample as stored: `image` is the file's bytes, still encoded."""

    key: str
    shard: Path
    image: bytes
    label: int | None


class Dataset:
    """Samples 0 .. num_samples - 1 over a list of shards; safe to read from any number of threads.

    Args:
        shards: The tars, in the order in which their samples are numbered.
        info: What `dataset.json` says, if there is one.
        joint: Where the joint index of these shards lies, if not in the user's cache.
    """

    def __init__(self, shards: Sequence[Path], info: dict | None = None, joint: Path | None = None) -> None:
        self.shards = tuple(shards)
        self.index = open_index(self.shards, joint)
        self.shard_sizes: tuple[int, ...] = tuple(self.index.counts.tolist())
        self.num_samples = len(self.index)
        if not self.num_samples:
            raise ValueError(
                f"no sample in {len(self.shards)} shard(s), the first of them {self.shards[0]}; "
                "a sample is a jpg, jpeg, png or webp member"
            )
        info = info or {}
        self.mean: tuple[float, ...] | None = _tuple(info.get("mean"))  # per channel, of pixels in 0 .. 1
        self.std: tuple[float, ...] | None = _tuple(info.get("std"))
        self.classes: tuple[str, ...] | None = _tuple(info.get("classes"))
        self.packed = _packed(info)  # samples by shard's name, as far as dataset.json tells
        self.labels = self.index.labels  # (num_samples,) int32 or int64, -1 where unknown; perhaps a view of a file
        if self.index.findings:
            num_problems, num_shards = len(self.index.findings), len(self.shards)
            _log.warning("%d of %d shards have problems; `selfsight verify` lists them", num_problems, num_shards)
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def checksum(self) -> str:
        """A hash over the shards' names and digests: equal where the samples and their numbers are."""
        digest = hashlib.sha256()
        for number, name in enumerate(self.index.names):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + self.index.digest(number).encode())
        return digest.hexdigest()

    @property
    def num_image_bytes(self) -> int:
        """Of all images, as stored."""
        return int(self.index.image_bytes.sum())

    def key(self, sample: int) -> tuple[str, Path]:
        """The key and the shard of a sample."""
        shard, row = self._locate(sample)
        return self.index.entry(shard, row).key, self.shards[shard]

    def read(self, sample: int) -> Sample:
        """Read one sample.

        Raises:
            IndexError: `sample` is not one of 0 .. num_samples - 1.
            DamageError: The stored index says of it what cannot be.
            OSError: The file system goes on failing, see `steadily`; that is no property of the sample, so nobody
                should skip it. Or the shard has shrunk.
        """
        shard, row = self._locate(sample)
        entry = self.index.entry(shard, row)

        def read() -> bytes:
            file = self._file(shard)  # held for as long as it is read
            return os.pread(file.descriptor, entry.image_size, entry.image_offset)

        image = steadily(self.shards[shard], read, self.close)
        if len(image) < entry.image_size:
            raise ShardChangedError(self.shards[shard], "has shrunk")
        return Sample(entry.key, self.shards[shard], image, None if entry.label == NO_LABEL else entry.label)

    def check_unchanged(self, sample: int) -> None:
        """Raise ShardChangedError if the shard of a sample has another size or time of change than its index."""
        shard, _ = self._locate(sample)
        now, indexed = identify(self.shards[shard]), self.index.identity(shard)
        if now.size != indexed.size or (now.stamp != indexed.stamp and None not in (now.stamp, indexed.stamp)):
            raise ShardChangedError(self.shards[shard], "has changed")

    def over(self, shards: Sequence[Path]) -> Dataset:
        """A data set of other shards that is read in the same way."""
        return Dataset(shards)

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
        shard = int(np.searchsorted(self.index.ends, sample, side="right"))
        return shard, int(sample - self.index.ends[shard] + self.shard_sizes[shard])

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                file = self._open[shard] = _OpenFile(self.shards[shard])
                if len(self._open) > _MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return file


class _OpenFile:
    """A file descriptor that closes once its last user lets go, which another thread's read may be."""

    def __init__(self, path: Path) -> None:
        self.descriptor = open_shard(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_dataset(spec: str | Path, split: str = "train") -> Dataset:
    """Open the shards that `spec` names.

    Args:
        spec: A folder, of which `{split}-*.tar` is taken in the order of the names; or a path with
            `*`, `?` or `[...]` in it; or one with braces such as `x-{000..009}.tar`; or one tar.
        split: Of a folder only.

    Raises:
        FileNotFoundError: There are no such shards; the message says what there is.
        ValueError: A shard is named twice, or no shard holds a sample.
    """
    shards = find_shards(spec, split)
    repeated = [shard for shard, count in Counter(shards).items() if count > 1]
    if repeated:
        raise ValueError(f"{spec} names {repeated[0]} more than once; name every shard once")
    folder = Path(spec).expanduser()
    joint = joint_place(folder, split) if folder.is_dir() else None
    return Dataset(shards, _read_info(shards[0].parent / "dataset.json"), joint)


def find_shards(spec: str | Path, split: str = "train") -> list[Path]:
    """The tars that `spec` names, in order; see `open_dataset`."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        shards = sorted(folder.glob(f"{split}-*.tar"))
        if shards:
            return shards
        others = sorted({path.name.rpartition("-")[0] or path.name for path in folder.glob("*.tar")})
        if not others:
            raise FileNotFoundError(f"{folder} holds no .tar shards; make some with `selfsight pack IMAGES {folder}`")
        raise FileNotFoundError(
            f"{folder} holds no {split}-*.tar; its shards begin with {', '.join(others[:10])}. "
            f"Name the split, or the shards themselves: '{folder / others[0]}*.tar'"
        )
    shards = []
    for text in braceexpand(str(spec)):
        path = Path(text).expanduser()
        if any(letter in text for letter in "*?["):
            found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not found:
                raise FileNotFoundError(f"no file matches {path}")
            shards.extend(found)
        elif path.is_file():
            shards.append(path)
        else:
            raise FileNotFoundError(
                f"{path} does not exist; the data are a folder of shards, a tar, or tars by * or {{0..9}}"
            )
    return shards


def _packed(info: dict) -> dict[str, int]:
    try:
        return {shard["name"]: int(shard["samples"]) for split in info["splits"].values() for shard in split["shards"]}
    except (KeyError, TypeError, AttributeError, ValueError):  # none that `selfsight pack` wrote
        return {}


def _read_info(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); pack the data again, or remove the file") from error


def _tuple(values: list | None) -> tuple | None:
    return None if values is None else tuple(values)
