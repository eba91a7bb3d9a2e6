"""The seam between `pack` and where images come from."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_pipelines.images.pixels import check_file_size
from data_pipelines.packing.listing import Listing, ListingEntry, Membership, Skipped


class Content(NamedTuple):
    """The bytes of one entry, as stored in the source."""

    image: bytes
    json: bytes | None
    maps: tuple[tuple[str, bytes], ...] = ()  # what each is called behind the key, such as mask.png, and its bytes
    frames: tuple[bytes, ...] = ()  # of a stack, all of them in order; `image` is the first


class Columns(NamedTuple):
    """Which columns of a table to read; None: found by type and name."""

    image: str | None = None
    label: str | None = None
    group: str | None = None  # of what must not be divided between splits, such as a patient
    mask: str | None = None  # of masks: their paths, or in a table with images their bytes


ANY_COLUMNS = Columns()


class Source(Protocol):
    """Images somewhere, with what is known of them: listed once, then read entry by entry.

    Making one reads no pixels: names, sizes, labels. Listing and reading take memory that does not grow with the bytes
    of the images, and nearly none with their number (`Listing`).
    """

    kind: str  # as in --from
    root: Path
    listing: Listing
    memberships: list[Membership]  # by the numbers in `listing.membership_numbers`
    classes: tuple[str, ...] | None  # names of the labels that are numbers, where the source knows them
    mask_names: dict[str, str] | None  # of the levels of masks, where the source knows them
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

    def files(self) -> Iterator[Path]:
        """The files that the entries are read from, in an order that is the same for the same source; some may come
        several times."""

    def close(self) -> None:
        """Let go of files."""


class ListedSource(ABC):
    """What most sources share: entries that are read in any order, one by one, and lie in no tar of ours."""

    def __init__(self, root: Path, listing: Listing) -> None:
        self.root, self.listing = root, listing
        self.shards: dict[str, int] = {}
        self.classes: tuple[str, ...] | None = None
        self.mask_names: dict[str, str] | None = None
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []

    def windows(self, seed: int) -> np.ndarray | None:
        """None: any order will do."""
        return None

    def contents(self, numbers: Sequence[int]) -> Iterator[Callable[[], Content]]:
        """See `Source`."""
        return (partial(self._content, number) for number in numbers)

    def key_in_shard(self, number: int) -> tuple[int, str]:
        """Not to be asked: there are no `shards`."""
        raise AssertionError("asked for the shard of an entry that lies in none")

    def files(self) -> Iterator[Path]:
        """See `Source`."""
        for number in range(len(self.listing)):
            yield from self._files_of(self.listing.entry(number))

    def close(self) -> None:
        """Let go of files."""
        self.listing.close()

    def _files_of(self, entry: ListingEntry) -> list[Path]:
        """Those that an entry is read from."""
        return [self.root / entry.path]

    @abstractmethod
    def _content(self, number: int) -> Content:
        """Read an entry."""


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
