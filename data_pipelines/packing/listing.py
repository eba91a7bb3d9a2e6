"""What a source of images holds, entry by entry, in some 40 bytes of memory each.

What only the reading of an entry needs (its path, where its bytes lie) is in an unnamed temporary file; only what the
planning of the shards needs is in memory, as arrays.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tempfile
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.images.sample import SUFFIXES, TEXT_SUFFIX

GROUP_KEY = "group"  # in the json of an image whose group was found in its path
_MAX_KEY_LENGTH = 80  # so that key and suffix fit into a ustar header
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_RECORD = struct.Struct("<iqqqI")  # file, offset, json_offset, json_size, bytes of the path
_HAS_MAPS = 1 << 31  # in the last: how many maps there are follows, in a byte, and then each of them
_MAP = struct.Struct("<Bqq")  # place in `_MAP_SUFFIXES`, offset, bytes
_MAP_SUFFIXES = (*(suffix for suffixes in SUFFIXES.values() for suffix in suffixes), TEXT_SUFFIX)


class MapPlace(NamedTuple):
    """A map that lies beside an image of a source, see `images.maps`; or its captions."""

    suffix: str  # what it is called behind the key, such as mask.png
    offset: int  # the source's own: where it finds the bytes
    size: int


class ListingEntry(NamedTuple):
    """One image of a source."""

    path: str  # within the source, with forward slashes; no two entries share one
    size: int  # bytes of the image; of a row of a parquet file about
    file: int = 0  # this and the next three are the source's own: where it finds the bytes
    offset: int = 0
    json_offset: int = 0
    json_size: int = 0  # 0: it has no json
    maps: tuple[MapPlace, ...] = ()


class Membership(NamedTuple):
    """What entries have in common: the split that the source names, the class by name or by number, and the group that
    no two splits may share, such as a patient."""

    split: str | None = None
    label: str | int | None = None
    group: str | None = None


class Skipped(NamedTuple):
    """An image that is not packed, and why."""

    path: str
    reason: str


class Listing:
    """The entries of a source in its own order, which is the same whenever the source is the same.

    Args:
        folder: Where the temporary file is made; some 100 bytes an entry.
        group_pattern: Finds the group of an entry in its path: its first parenthesis, or all that it matches.
    """

    def __init__(self, folder: Path, group_pattern: re.Pattern[str] | None = None) -> None:
        self._group_pattern = group_pattern
        self.finds_groups = group_pattern is not None
        self.group_key = GROUP_KEY  # or the column of a table, which is in the json as it is
        self.groups_frames = False  # nobody named groups, and those there are keep the frames of one file together
        self._spool = Spool(folder)
        self._ends = array("q")  # of the records in the spool
        self._sizes = array("q")
        self._memberships = array("i")
        self._path_hashes = array("Q")
        self._key_hashes = array("Q")
        self._numbers: dict[Membership, int] = {}
        self._digest = hashlib.sha256()
        self._repeated_keys = np.zeros(0, dtype=bool)
        self.repeats = np.zeros(0, dtype=np.int64)  # entries whose path an earlier one has, ascending

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, entry: ListingEntry, membership: Membership, key: str | None = None) -> None:
        """Append an entry; its key is made of `key`, by default of the path without its suffix."""
        if self._group_pattern is not None:
            self.groups_frames = False
            membership = membership._replace(group=self._group_of(entry.path))
        path = entry.path.encode("utf-8", "surrogateescape")
        name = key_text(entry.path) if key is None else key
        record = (
            _RECORD.pack(
                entry.file, entry.offset, entry.json_offset, entry.json_size, len(path) | _HAS_MAPS * bool(entry.maps)
            )
            + _packed_maps(entry.maps)
            + path
            + (b"" if key is None else key.encode("utf-8", "surrogateescape"))
        )
        self._ends.append(self._spool.append(record) + len(record))
        self._sizes.append(entry.size + entry.json_size + _bytes_of(entry.maps))
        number = self._numbers.get(membership)
        if number is None:
            number = self._numbers[membership] = len(self._numbers)
            self._digest.update(
                repr(tuple(membership[:2] if membership.group is None else membership)).encode(
                    "utf-8", "surrogateescape"
                )
            )
        self._memberships.append(number)
        self._path_hashes.append(_hash(path))
        self._key_hashes.append(_hash(_plain_key(name, entry.path).encode()))
        self._digest.update(record + struct.pack("<qi", entry.size, number))

    def note(self, fact: bytes) -> None:
        """Make a fact that is in no entry part of the fingerprint."""
        self._digest.update(hashlib.sha256(fact).digest())

    def finish(self) -> None:
        """End the adding; from now on the entries can be read."""
        self._spool.flush()
        if not len(self):
            return
        keys, paths = (np.frombuffer(hashes, dtype=np.uint64) for hashes in (self._key_hashes, self._path_hashes))
        self._repeated_keys = np.zeros(len(self), dtype=bool)
        self._repeated_keys[_members_of_ties(keys)] = True
        ties = _members_of_ties(paths)
        _, first = np.unique(paths[ties], return_index=True)
        self.repeats = np.setdiff1d(ties, ties[first])
        del keys, paths
        self._key_hashes, self._path_hashes = array("Q"), array("Q")

    @property
    def fingerprint(self) -> str:
        """A hash over all entries: equal for equal sources wherever they lie."""
        return self._digest.hexdigest()

    @property
    def memberships(self) -> list[Membership]:
        """The memberships, in the order in which they were met."""
        return list(self._numbers)

    @property
    def membership_numbers(self) -> np.ndarray:
        """Of every entry the number of its membership: (n,) int32."""
        return np.frombuffer(self._memberships, dtype=np.int32) if self._memberships else np.zeros(0, dtype=np.int32)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of image, json and maps of every entry: (n,) int64."""
        return np.frombuffer(self._sizes, dtype=np.int64) if self._sizes else np.zeros(0, dtype=np.int64)

    def entry(self, number: int) -> ListingEntry:
        """An entry by its number; from any thread."""
        return self._read(number)[0]

    def key(self, number: int) -> str:
        """Its key, which no other entry has: without dots and slashes, at which WebDataset would end it."""
        entry, name = self._read(number)
        key = _plain_key(name, entry.path)
        return _hashed(key, entry.path) if self._repeated_keys[number] else key

    def close(self) -> None:
        """Let go of the temporary file."""
        self._spool.close()

    def _group_of(self, path: str) -> str:
        assert self._group_pattern is not None
        match = self._group_pattern.search(path)
        group = match and match[1 if self._group_pattern.groups else 0]
        if not group:
            raise ValueError(
                f"{path} is of no group, as {self._group_pattern.pattern!r} is not found in it (--group-pattern); "
                "every image needs one. Widen the pattern, or leave such images out of the source"
            )
        return group

    def _read(self, number: int) -> tuple[ListingEntry, str]:
        start, end = self._ends[number - 1] if number else 0, self._ends[number]
        record = self._spool.read(start, end - start)
        file, offset, json_offset, json_size, length = _RECORD.unpack_from(record)
        begin = _RECORD.size
        maps: tuple[MapPlace, ...] = ()
        if length & _HAS_MAPS:
            maps, begin, length = (
                _unpacked_maps(record, begin),
                begin + 1 + _MAP.size * record[begin],
                length ^ _HAS_MAPS,
            )
        first = begin + length
        path = record[begin:first].decode("utf-8", "surrogateescape")
        own = record[first:].decode("utf-8", "surrogateescape")
        size = self._sizes[number] - json_size - _bytes_of(maps)
        return ListingEntry(path, size, file, offset, json_offset, json_size, maps), own or key_text(path)


class Spool:
    """Bytes appended by one thread and then read by any: an unnamed file, gone with the process."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115
        self._position = 0

    def append(self, content: bytes) -> int:
        """Where it begins."""
        self._file.write(content)
        self._position += len(content)
        return self._position - len(content)

    def flush(self) -> None:
        """From now on everything can be read."""
        self._file.flush()

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()


def _bytes_of(maps: tuple[MapPlace, ...]) -> int:
    return sum(one.size for one in maps)


def _packed_maps(maps: tuple[MapPlace, ...]) -> bytes:
    """Nothing for none, so that what has none is known by the same bytes as ever."""
    parts = [_MAP.pack(_MAP_SUFFIXES.index(one.suffix), one.offset, one.size) for one in maps]
    return bytes([len(maps)]) + b"".join(parts) if maps else b""


def _unpacked_maps(record: bytes, begin: int) -> tuple[MapPlace, ...]:
    found = (_MAP.unpack_from(record, begin + 1 + _MAP.size * number) for number in range(record[begin]))
    return tuple(MapPlace(_MAP_SUFFIXES[place], offset, size) for place, offset, size in found)


def _members_of_ties(hashes: np.ndarray) -> np.ndarray:
    """The places whose value another place has too, ascending."""
    order = hashes.argsort(kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    return np.unique(np.concatenate([order[1:][same], order[:-1][same]]))


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def key_text(path: str) -> str:
    """A path without its suffix."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _plain_key(name: str, path: str) -> str:
    key = _UNSAFE.sub("_", name.replace("/", "-")) or "_"
    return key if len(key) <= _MAX_KEY_LENGTH else _hashed(key, path)


def _hashed(key: str, path: str) -> str:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{key[: _MAX_KEY_LENGTH - 17]}-{digest}"
