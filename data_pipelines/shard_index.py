"""Where every sample lies in every shard, so that any of them is one read away.

An index is built once per shard from the tar's headers and kept beside the shard, or in the user's cache
when that folder is read-only. It is rebuilt when the shard's size or time of change differs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.files import atomic_write
from data_pipelines.tar import TarDamageError, members

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "npy")
NO_LABEL = -1
_VERSION = 1
INDEX_SUFFIX = ".index.npz"
_MAX_LABEL_BYTES = 32
# WebDataset's rules: a key ends at the first dot of the base name; names in double underscores are its own
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
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


@dataclass
class _Entry:
    image: tuple[int, int] | None = None
    image_rank: tuple[bool, bool] = (False, False)  # no array; its whole suffix is "jpg" or such, not "depth.png"
    label: int = NO_LABEL
    has_label: bool = False
    json: tuple[int, int] = (0, 0)
    duplicates: list[str] = field(default_factory=list)
    other_images: list[str] = field(default_factory=list)  # as good as the one that is used


def build_index(shard: Path) -> ShardIndex:
    """Read a shard's headers and labels.

    A sample is a key with an image. Of several images or labels under one key the first counts; an `.npy` array is the
    image only where nothing else is, for it may as well be features or a mask. Of an archive cut short, everything
    before the cut.
    """
    entries: dict[str, _Entry] = {}
    problems: list[str] = []
    num_bad_labels, truncated = 0, False
    with shard.open("rb") as file:
        try:
            for name, offset, size in members(shard):
                match = _NAME.match(name)
                if match is None or _META.search(name):
                    continue
                key, suffix = match[1], match[2].lower()
                entry = entries.setdefault(key, _Entry())
                if suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
                    rank = (not suffix.endswith("npy"), suffix in IMAGE_SUFFIXES)
                    if entry.image is None or rank > entry.image_rank:
                        entry.image, entry.image_rank, entry.other_images = (offset, size), rank, []
                    elif rank == entry.image_rank:
                        entry.other_images.append(name)
                elif suffix == "cls":
                    if entry.has_label:
                        entry.duplicates.append(name)
                        continue
                    label = _label(os.pread(file.fileno(), min(size, _MAX_LABEL_BYTES), offset))
                    num_bad_labels += label is None
                    entry.label, entry.has_label = NO_LABEL if label is None else label, True
                elif suffix == "json" and not entry.json[1]:
                    entry.json = (offset, size)
        except TarDamageError as error:
            truncated = True
            problems.append(f"{error}; the {len(entries)} keys before that are used. Fetch or pack the shard again")
    samples = {key: entry for key, entry in entries.items() if entry.image is not None}
    repeated = [name for entry in entries.values() for name in (*entry.other_images, *entry.duplicates)]
    num_without_image = len(entries) - len(samples)
    if repeated:
        problems.append(
            f"{len(repeated)} members repeat the key and kind of an earlier one and are not used, the first of them "
            f"{repeated[0]!r} (a key ends at the first dot of the file's name, so a_0.5.jpg and a_0.7.jpg are both a_0)"
        )
    if num_without_image:
        without = next(key for key, entry in entries.items() if entry.image is None)
        problems.append(
            f"{num_without_image} keys have no image ({', '.join(IMAGE_SUFFIXES)}), the first of them {without!r}"
        )
    if num_bad_labels:
        problems.append(f"{num_bad_labels} .cls members are not an integer of 0 or more; those samples have no label")
    found = list(samples.values())
    images = np.array([entry.image for entry in found], dtype=np.int64).reshape(-1, 2)
    json = np.array([entry.json for entry in found], dtype=np.int64).reshape(-1, 2)
    return ShardIndex(
        keys=tuple(samples),
        image_offsets=images[:, 0].copy(),
        image_sizes=images[:, 1].copy(),
        labels=np.array([entry.label for entry in found], dtype=np.int64),
        json_offsets=json[:, 0].copy(),
        json_sizes=json[:, 1].copy(),
        problems=tuple(problems),
        num_without_image=num_without_image,
        num_duplicates=len(repeated),
        num_bad_labels=num_bad_labels,
        truncated=truncated,
    )


def _label(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 19 else None


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
