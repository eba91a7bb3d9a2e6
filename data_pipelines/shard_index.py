"""Where every sample lies in every shard, so that any of them is one read away.

An index is built once per shard from the tar's headers and kept beside the shard, or in the user's cache
when that folder is read-only. It is rebuilt when the shard's size or time of change differs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.cases import Severity
from data_pipelines.files import atomic_write
from data_pipelines.shard_scan import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from data_pipelines.shard_scan import NO_LABEL, scan_shard

_VERSION = 1
INDEX_SUFFIX = ".index.npz"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in the order of the tar; the arrays have one entry a sample.

    `problems` says in words what was found and passed over; it is empty for a sound shard.
    """

    keys: tuple[str, ...]
    image_offsets: np.ndarray  # int64, bytes from the start of the tar
    image_sizes: np.ndarray  # int64, bytes
    labels: np.ndarray  # int64, NO_LABEL where there is none
    json_offsets: np.ndarray  # int64
    json_sizes: np.ndarray  # int64, 0 where there is no json
    problems: tuple[str, ...] = ()
    num_without_image: int = 0
    num_duplicates: int = 0
    num_bad_labels: int = 0
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.keys)


def build_index(shard: Path) -> ShardIndex:
    """Read a shard's headers and labels; what a sample is, says `scan_shard`. Raises OSError as it does."""
    scan = scan_shard(shard)
    found, counts = list(scan.samples.values()), scan.findings.counts
    images = np.array([entry.image for entry in found], dtype=np.int64).reshape(-1, 2)
    json = np.array([entry.json for entry in found], dtype=np.int64).reshape(-1, 2)
    return ShardIndex(
        keys=tuple(scan.samples),
        image_offsets=images[:, 0].copy(),
        image_sizes=images[:, 1].copy(),
        labels=np.array([entry.label for entry in found], dtype=np.int64),
        json_offsets=json[:, 0].copy(),
        json_sizes=json[:, 1].copy(),
        problems=tuple(scan.findings.sentence(case, with_shard=False) for case in scan.findings.of(Severity.ERROR)),
        num_without_image=counts["no_image"],
        num_duplicates=counts["repeated_member"],
        num_bad_labels=counts["bad_label"],
        truncated=scan.broken,
    )


def load_index(shard: Path) -> ShardIndex:
    """The stored index of a shard, or a new one, which is then stored where that is possible."""
    status = shard.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    places = _places(shard, status)
    for place in places:
        index = _load(place, stamp)
        if index is not None:
            return index
    index = build_index(shard)
    for problem in index.problems:
        _log.warning("%s: %s", shard, problem)
    for place in places:
        if _store(place, index, stamp):
            return index
    _log.warning("no place to keep the index of %s; set SELFSIGHT_CACHE to a folder that can be written to", shard)
    return index


def _places(shard: Path, status: os.stat_result) -> tuple[Path, Path]:
    """Beside the shard, then in the user's cache under a name that holds the shard's path, size and time."""
    cache = Path(os.environ.get("SELFSIGHT_CACHE") or Path.home() / ".cache" / "selfsight")
    identity = f"{shard.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(identity).hexdigest()
    return shard.with_name(shard.name + INDEX_SUFFIX), cache / "index" / (digest[:32] + INDEX_SUFFIX)


def _load(place: Path, stamp: tuple[int, int]) -> ShardIndex | None:
    """None when there is no index, or a stale or damaged one."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if tuple(stored["stamp"].tolist()) != (_VERSION, *stamp):
                return None
            counts = stored["counts"].tolist()
            index = ShardIndex(
                keys=_split(stored["keys"]),
                image_offsets=stored["image_offsets"],
                image_sizes=stored["image_sizes"],
                labels=stored["labels"],
                json_offsets=stored["json_offsets"],
                json_sizes=stored["json_sizes"],
                problems=_split(stored["problems"]),
                num_without_image=counts[0],
                num_duplicates=counts[1],
                num_bad_labels=counts[2],
                truncated=bool(counts[3]),
            )
            return index if _is_sound(index, shard_size=stamp[0]) else None
    except (OSError, KeyError, IndexError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _is_sound(index: ShardIndex, shard_size: int) -> bool:
    """Whether the arrays fit each other and point into the shard: a file from elsewhere is not taken at its word."""
    arrays = (index.image_offsets, index.image_sizes, index.labels, index.json_offsets, index.json_sizes)
    if any(array.shape != (len(index.keys),) or array.dtype != np.int64 for array in arrays):
        return False
    ends = ((index.image_offsets, index.image_sizes), (index.json_offsets, index.json_sizes))
    # sizes first: the sum of two large numbers could wrap around
    inside = all(
        (first >= 0).all() and (size >= 0).all() and (size <= shard_size).all() and (first <= shard_size - size).all()
        for first, size in ends
    )
    return inside and bool((index.labels >= NO_LABEL).all())


def _store(place: Path, index: ShardIndex, stamp: tuple[int, int]) -> bool:
    """Write under a temporary name, then rename: several ranks may do so at once. False: not permitted here."""
    folder = place.parent
    try:
        if folder.exists() and not stat.S_IMODE(folder.stat().st_mode) & 0o222:
            return False  # marked read-only; root could write all the same, and must not
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as file:
            np.savez(
                file,
                stamp=np.array([_VERSION, *stamp], dtype=np.int64),
                counts=np.array(
                    [index.num_without_image, index.num_duplicates, index.num_bad_labels, index.truncated],
                    dtype=np.int64,
                ),
                keys=_joined(index.keys),
                problems=_joined(index.problems),
                image_offsets=index.image_offsets,
                image_sizes=index.image_sizes,
                labels=index.labels,
                json_offsets=index.json_offsets,
                json_sizes=index.json_sizes,
            )
    except OSError:
        return False
    return True


def _joined(texts: tuple[str, ...]) -> np.ndarray:
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _split(array: np.ndarray) -> tuple[str, ...]:
    return tuple(array.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1])
