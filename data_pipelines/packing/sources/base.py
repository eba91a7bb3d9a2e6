"""The seam between `pack` and where images come from."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_pipelines.images.pixels import check_file_size
from data_pipelines.packing.listing import Group, Listing, Skipped

#: Names of folders and files that are splits, and the splits' names.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_PART = re.compile(r"(.+?)[-_.]\d+(-of-\d+)?")  # train-000000, train-00000-of-00010
_WORDS = re.compile(r"[-_]")


class Content(NamedTuple):
    """The bytes of one entry, as stored in the source."""

    image: bytes
    json: bytes | None


class Columns(NamedTuple):
    """Which columns of a table to read; None: found by type and name."""

    image: str | None = None
    label: str | None = None


ANY_COLUMNS = Columns()


class Source(Protocol):
    """Images somewhere, with what is known of them: listed once, then read entry by entry.

    Making one reads no pixels: names, sizes, labels. Listing and reading take memory that does not grow with the bytes
    of the images, and nearly none with their number (`Listing`).
    """

    kind: str  # as in --from
    root: Path
    listing: Listing
    groups: list[Group]  # by the numbers in `listing.group_numbers`
    classes: tuple[str, ...] | None  # names of the labels that are numbers, where the source knows them
    skipped: list[Skipped]  # what of the source is not in the listing
    notes: list[str]  # what else was passed over, in words
    shards: dict[str, int]  # what a list may call the tars, and their numbers; empty where the source has no tars

    def windows(self, seed: int) -> np.ndarray | None:
        """Of every entry the number of its window: (n,) int32.

        Shards take window after window and shuffle within them, so that a shard reads few pieces of the source and
        each of them once. None: any entry is read as easily after any other, and all are shuffled together.
        """

    def contents(self, numbers: Sequence[int]) -> Iterator[Callable[[], Content]]:
        """For every entry a function that gives its bytes; it may be called in another thread.

        Raises, as its functions do, OSError when the source cannot be read or changed since it was listed, and
        UnusableImageError where an entry is too large to be taken into memory.
        """

    def key_in_shard(self, number: int) -> tuple[int, str]:
        """Number of the tar that an entry lies in, and its key there; only where there are `shards`."""

    def close(self) -> None:
        """Let go of files."""


class ListedSource(ABC):
    """What most sources share: entries that are read in any order, one by one, and lie in no tar of ours."""

    listing: Listing

    def windows(self, seed: int) -> np.ndarray | None:
        """None: any order will do."""
        return None

    def contents(self, numbers: Sequence[int]) -> Iterator[Callable[[], Content]]:
        """See `Source`."""
        return (partial(self._content, number) for number in numbers)

    def key_in_shard(self, number: int) -> tuple[int, str]:
        """Not to be asked: there are no `shards`."""
        raise AssertionError("asked for the shard of an entry that lies in none")

    def close(self) -> None:
        """Let go of files."""
        self.listing.close()

    @abstractmethod
    def _content(self, number: int) -> Content:
        """Read an entry."""


def split_of(file: str) -> str | None:
    """The split that a file's path names: a folder on the way, or the file's own name up to its number."""
    *folders, name = file.split("/")
    for folder in folders:
        if folder in SPLIT_NAMES:
            return SPLIT_NAMES[folder]
    stem = name.partition(".")[0]
    numbered = _PART.fullmatch(stem)
    name = numbered[1] if numbered else stem
    last = _WORDS.split(name)[-1]  # cifar10-train
    if last in SPLIT_NAMES:
        return SPLIT_NAMES[last]
    return name if numbered else None


def splits_of_files(files: Sequence[str]) -> list[str | None]:
    """The split of each file; all None where the names do not tell splits.

    Raises:
        ValueError: Some files are train's, and of others it is not known.
    """
    found = [split_of(file) for file in files]
    if "train" in found:
        unknown = [file for file, split in zip(files, found, strict=True) if split is None]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(files)} files belong to no split, the first of them {unknown[0]}; name them "
                "as train-00000, or pack them by themselves"
            )
        return found
    return found if set(found) <= {"val", "test"} else [None] * len(files)


def groups_of_folders(folders: Iterable[str], labels: bool = True) -> list[Group]:
    """Splits and classes of images from the folders they lie in (with forward slashes, "" for none).

    If all images lie in folders named train, val (or valid, validation) and test, train among them, each is a split.
    Below that, the first-level folder is the class, unless `labels` is False.

    Raises:
        ValueError: Two folders are one split; or images lie both in and beside class folders.
    """
    parts = [folder.split("/") if folder else [] for folder in folders]
    first = sorted({part[0] if part else "" for part in parts})
    depth = int("train" in first and set(first) <= SPLIT_NAMES.keys())
    if depth and len({SPLIT_NAMES[name] for name in first}) < len(first):
        raise ValueError(f"the folders {', '.join(first)} have more than one for the split val; leave one of them")
    names = [part[depth] if labels and len(part) > depth else None for part in parts]
    if None in names and any(name is not None for name in names):
        loose = "/".join(parts[names.index(None)]) or "the topmost folder"
        raise ValueError(
            f"images lie beside the class folders, some of them in {loose}; move them into a class folder or out of "
            "the tree, or pack without labels (--no-labels)"
        )
    return [Group(SPLIT_NAMES[part[0]] if depth else None, name) for part, name in zip(parts, names, strict=True)]


def read_exactly(path: Path, size: int) -> bytes:
    """A whole file that had `size` bytes when it was listed; UnusableImageError where they are too many."""
    check_file_size(size)
    content = path.read_bytes()
    if len(content) != size:
        raise OSError(f"{path} had {size} bytes and has {len(content)} now; pack when nothing writes to the images")
    return content


def read_piece(path: Path, offset: int, size: int) -> bytes:
    """Part of a file; UnusableImageError where it is too large."""
    check_file_size(size)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(content) != size:
        raise OSError(f"{path} ends at byte {offset + len(content)}; it was longer when the pack began")
    return content
