"""An index of samples as a file, and several indexes as one.

The file holds named arrays in one file, mapped into memory and never taken at their word.

Little-endian. A head (magic, version, number of sections, bytes of the file, bytes of the tables, their SHA-256), a
table of sections (name, type, offset, length), then the sections, each at a multiple of 64 bytes: first the tables, few
bytes that are read and checked as a whole, then the arrays, of which nothing is read before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.files import atomic_write, parse_json
from data_pipelines.shards.index import BESIDE, DIGEST_BYTES, PER_SAMPLE, TABLES, DamageError, Findings, Index

#: 2: labels of dotted names are read; an index of before says "no label" of them, and is built again.
_MAGIC, _VERSION = b"SELFSIDX", 2
_HEAD = struct.Struct("<8sIIQQ32s")
_SECTION = struct.Struct("<24s8sQQ")
_ALIGNMENT = 64
_TYPES = frozenset(("|u1", "<u4", "<u8", "<i4", "<i8"))
_MAX_SECTIONS = 64
_SMALL = 1 << 22  # bytes
_PIECE = 1 << 24  # bytes written or hashed at a time
_LATER = tuple(f"{kind}_{what}" for kind in BESIDE[1:] for what in ("blocks", "sizes"))  # not in older indexes
_MAPS_KNOWN, _TEXTS_KNOWN = "maps_known", "texts_known"  # there where they were looked for


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


def write_joined(file: BinaryIO, sources: Sequence[Callable[[], Index]]) -> None:
    """Write one index of all the shards; each source is opened twice and let go, so that memory stays small."""
    names: list[str] = []
    findings: dict[int, Findings] = {}
    tables: dict[str, list[np.ndarray]] = {name: [] for name in TABLES}
    kinds = dict.fromkeys(PER_SAMPLE, "")
    there = dict.fromkeys(BESIDE, False)
    knows_maps = knows_texts = True
    for source in sources:
        index = source()
        findings |= {len(names) + shard: found for shard, found in index.findings.items()}
        names += index.names
        for name in TABLES:
            tables[name].append(getattr(index, name).copy())
        for name in PER_SAMPLE:
            kinds[name] = max(kinds[name], getattr(index, name).dtype.str, key=_width)
        there = {kind: found or index.has(kind) for kind, found in there.items()}
        knows_maps &= index.knows_maps
        knows_texts &= index.knows_texts
    counts = np.concatenate([np.diff(ends, prepend=0) for ends in tables.pop("ends")])
    keys_counts = np.concatenate([np.diff(ends, prepend=0) for ends in tables.pop("keys_ends")])
    stored = {name: np.concatenate(parts).reshape(-1) for name, parts in tables.items()}
    stored |= {"ends": np.cumsum(counts), "keys_ends": np.cumsum(keys_counts)}
    stored["names"] = _bytes("\0".join(names))
    stored["findings"] = _bytes(json.dumps([[shard, asdict(found)] for shard, found in findings.items()]))
    if knows_maps:  # else some shard was indexed by a version that did not look for them
        stored[_MAPS_KNOWN] = np.ones(1, np.uint8)
    if knows_texts:
        stored[_TEXTS_KNOWN] = np.ones(1, np.uint8)
    num_samples, num_bytes = int(counts.sum()), int(keys_counts.sum())
    lengths = {name: (kinds[name], num_samples if there.get(name.partition("_")[0], True) else 0) for name in kinds}
    offsets = create(file, stored, lengths | {"keys_bytes": ("|u1", num_bytes)})
    for source in sources:
        index = source()
        for name, (kind, length) in lengths.items():
            values = getattr(index, name)
            if length:
                fill(file, offsets[name], values.astype(kind) if len(values) else np.zeros(len(index), kind))
                offsets[name] += len(index) * np.dtype(kind).itemsize
        fill(file, offsets["keys_bytes"], index.keys_bytes)
        offsets["keys_bytes"] += len(index.keys_bytes)


def join(parts: Sequence[Index]) -> Index:
    """One index of all the shards, in memory."""
    file = io.BytesIO()
    write_joined(file, [lambda part=part: part for part in parts])  # type: ignore[misc]
    return _index_of(parse(file.getvalue(), "the index"), "the index")


def read_index(path: Path) -> Index:
    """A stored index; of its arrays nothing is read yet.

    A small file is read, a large one mapped into memory; for as long as it is, nobody may cut it short in its place,
    which the kernel answers with SIGBUS. Ours are written under another name and renamed, which harms nobody.

    Raises:
        DamageError: It is damaged, or of another kind or version.
        OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= _SMALL:
            return _index_of(parse(file.read(), str(path)), str(path))
        return mapped_index(file.fileno(), str(path))


def mapped_index(descriptor: int, path: str) -> Index:
    """The index in an open file, mapped into memory; raises DamageError as `read_index` does."""
    file = os.fdopen(os.dup(descriptor), "rb")
    index = _index_of(parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path), path)
    return replace(index, file=file)


def may_write(folder: Path) -> bool:
    """Whether files may be made in a folder, which is made if need be; not in one that is marked read-only, even by
    root, who could."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return bool(stat.S_IMODE(folder.stat().st_mode) & 0o222) and os.access(folder, os.W_OK)
    except OSError:
        return False


def store(place: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Write under a temporary name, then rename: several ranks may do so at once. False: not permitted here."""
    if not may_write(place.parent):
        return False
    try:
        with atomic_write(place) as file:
            write(file)
    except OSError:
        return False
    return True


def _index_of(found: dict[str, np.ndarray], path: str) -> Index:
    found = {**dict.fromkeys(_LATER, np.zeros(0, "<u4")), **found}
    missing = {*TABLES, *PER_SAMPLE, "names", "findings", "keys_bytes"} - found.keys()
    if missing:
        raise DamageError(f"{path}: there is no section {min(missing)!r}")
    try:
        names = tuple(found["names"].tobytes().decode("utf-8", "surrogateescape").split("\0"))
        findings = {int(shard): _findings(entry) for shard, entry in parse_json(found["findings"].tobytes())}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamageError(f"{path}: {error}") from error
    tables = {name: found[name] for name in TABLES}
    arrays = {name: found[name] for name in PER_SAMPLE}
    ends, keys_ends, digests = tables["ends"], tables["keys_ends"], tables["digests"]
    num_samples = int(ends[-1]) if len(ends) else 0
    fits = (
        all(len(table) == len(names) for name, table in tables.items() if name != "digests")
        and len(digests) == len(names) * DIGEST_BYTES
        and all(table.dtype == np.int64 for name, table in tables.items() if name != "digests")
        and all(array.dtype.kind == ("i" if name == "labels" else "u") for name, array in arrays.items())
        and found["keys_bytes"].dtype == digests.dtype == np.uint8
        and (np.diff(ends, prepend=0) >= 0).all()
        and (np.diff(keys_ends, prepend=0) >= 0).all()
        and int(keys_ends[-1]) == len(found["keys_bytes"])
        and all(len(arrays[name]) == num_samples for name in ("image_blocks", "image_sizes", "labels", "key_ends"))
        and all(len(arrays[f"{kind}_blocks"]) == len(arrays[f"{kind}_sizes"]) for kind in BESIDE)
        and all(len(arrays[f"{kind}_sizes"]) in (0, num_samples) for kind in BESIDE)
        and findings.keys() <= set(range(len(names)))
    )
    if not fits:
        raise DamageError(f"{path}: its sections do not fit each other")
    tables["digests"] = digests.reshape(-1, DIGEST_BYTES)
    return Index(
        names=names,
        findings=findings,
        keys_bytes=found["keys_bytes"],
        knows_maps=_MAPS_KNOWN in found,
        knows_texts=_TEXTS_KNOWN in found,
        **tables,
        **arrays,
    )


def _width(kind: str) -> int:
    return np.dtype(kind).itemsize if kind else 0


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def _findings(entry: dict[str, Any]) -> Findings:
    """Of those fields that this version knows."""
    values: dict[str, Any] = {
        field.name: int(entry[field.name]) for field in fields(Findings)[1:] if field.name in entry
    }
    return Findings(tuple(str(problem) for problem in entry.get("problems", ())), **values)
