"""Named arrays in one file, mapped into memory and never taken at their word: the form in which an index is stored.

Little-endian. A head (magic, version, number of sections, bytes of the file, bytes of the tables, their SHA-256), a
table of sections (name, type, offset, length), then the sections, each at a multiple of 64 bytes: first the tables, few
bytes that are read and checked as a whole, then the arrays, of which nothing is read before it is used.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAGIC, _VERSION = b"SELFSIDX", 1
_HEAD = struct.Struct("<8sIIQQ32s")
_SECTION = struct.Struct("<24s8sQQ")
_ALIGNMENT = 64
_TYPES = frozenset(("|u1", "<u4", "<u8", "<i4", "<i8"))
_MAX_SECTIONS = 64
_SMALL = 1 << 22  # bytes
_PIECE = 1 << 24  # bytes written or hashed at a time


class DamageError(ValueError):
    """A file that is not what was written."""


def create(file: BinaryIO, tables: Mapping[str, np.ndarray], arrays: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """Write head and tables, and make room for arrays of these types and lengths; the arrays' offsets, to be filled."""
    lengths = {name: (array.dtype.str, len(array)) for name, array in tables.items()} | dict(arrays)
    position = _HEAD.size + _SECTION.size * len(lengths)
    sections, offsets, end_of_tables = b"", {}, 0
    for name, (kind, length) in lengths.items():
        assert kind in _TYPES, kind
        position = _aligned(position)
        offsets[name] = position
        sections += _SECTION.pack(name.encode(), kind.encode(), position, length)
        position += np.dtype(kind).itemsize * length
        if name in tables:
            end_of_tables = position
    digest = hashlib.sha256(sections)
    file.seek(position - 1)
    file.write(b"\0")  # as long as it will be
    file.seek(_HEAD.size)
    file.write(sections)
    for name, array in tables.items():
        file.seek(offsets[name])
        file.write(array.tobytes())
        digest.update(array.tobytes())
    file.seek(0)
    file.write(_HEAD.pack(_MAGIC, _VERSION, len(lengths), position, end_of_tables, digest.digest()))
    return {name: offsets[name] for name in arrays}


def fill(file: BinaryIO, offset: int, array: np.ndarray) -> None:
    """Write part of an array to its place, a bounded number of bytes at a time."""
    file.seek(offset)
    length = max(1, _PIECE // max(1, array.itemsize))
    for first in range(0, len(array), length):
        file.write(array[first : first + length].tobytes())


def read(path: Path) -> dict[str, np.ndarray]:
    """All sections of a file, as read-only views of it; see `parse`.

    A small file is read, a large one mapped into memory; for as long as it is, nobody may cut it short in its place,
    which the kernel answers with SIGBUS. Ours are written under another name and renamed, which harms nobody.

    Raises:
        DamageError: See `parse`.
        OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= _SMALL:
            return parse(file.read(), str(path))
        return parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))


def parse(mapped: mmap.mmap | bytes, path: str) -> dict[str, np.ndarray]:
    """All sections of what `create` and `fill` wrote, as read-only views.

    Raises:
        DamageError: The bytes are of another kind or version, cut, or the tables are not what was written.
    """
    if len(mapped) < _HEAD.size:
        raise DamageError(f"{path} is no index: it has {len(mapped)} bytes")
    magic, version, count, stated, end_of_tables, expected = _HEAD.unpack_from(mapped)
    if magic != _MAGIC or version != _VERSION:
        raise DamageError(f"{path} is no index of version {_VERSION}")
    start = _HEAD.size + _SECTION.size * count
    if stated != len(mapped) or count > _MAX_SECTIONS or start > len(mapped):
        raise DamageError(f"{path} has {len(mapped)} bytes and was written with {stated}")
    digest = hashlib.sha256(mapped[_HEAD.size : start])
    found: dict[str, np.ndarray] = {}
    for number in range(count):
        raw_name, raw_kind, offset, length = _SECTION.unpack_from(mapped, _HEAD.size + _SECTION.size * number)
        name, kind = (text.rstrip(b"\0").decode("ascii", "replace") for text in (raw_name, raw_kind))
        if kind not in _TYPES or name in found:
            raise DamageError(f"{path}: section {name!r} of type {kind!r}")
        num_bytes = np.dtype(kind).itemsize * length
        if offset % _ALIGNMENT or offset < start or offset + num_bytes > len(mapped):
            raise DamageError(f"{path}: section {name!r} does not lie in the file")
        found[name] = np.frombuffer(mapped, kind, length, offset)
        if offset + num_bytes <= end_of_tables:
            digest.update(mapped[offset : offset + num_bytes])
    if digest.digest() != expected:
        raise DamageError(f"{path}: its tables are not what was written")
    return found


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
