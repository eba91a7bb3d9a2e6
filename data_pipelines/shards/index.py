"""Where every sample of a list of shards lies: tables with a row a shard, and arrays with an entry a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.shards.shard import Identity
from data_pipelines.shards.tar import BLOCK


class DamageError(ValueError):
    """A file that is not what was written."""


NO_LABEL = -1
NO_STAMP = -1
DIGEST_BYTES = 32
_PIECE = 1 << 20  # entries looked at at a time
#: The tables with one row a shard.
TABLES = ("sizes", "stamps", "ends", "keys_ends", "image_bytes", "digests")
#: What may lie beside an image, besides its label; the arrays of each are empty where no sample has any.
BESIDE = ("json", "mask", "depth", "text")
_ALWAYS = ("key_ends", "image_blocks", "image_sizes", "labels")
#: The arrays with one entry a sample.
PER_SAMPLE = (*_ALWAYS, *(f"{kind}_{what}" for kind in BESIDE for what in ("blocks", "sizes")))


class IndexEntry(NamedTuple):
    """One sample: where its members lie in its shard, in bytes."""

    key: str
    image_offset: int
    image_size: int
    label: int  # NO_LABEL where there is none
    json_offset: int
    json_size: int  # 0 where there is no json


@dataclass(frozen=True)
class Findings:
    """What was found in a shard and passed over; `problems` says it in words and is empty for a sound shard."""

    problems: tuple[str, ...] = ()
    num_without_image: int = 0
    num_duplicates: int = 0
    num_bad_labels: int = 0
    truncated: bool = False


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of `s` shards in the order of the shards and, within one, of the tar: `n` in all.

    The arrays may be views of a file that is mapped into memory, and are checked entry by entry where they are used.
    Offsets are kept in blocks of 512 bytes, at which every member of a tar begins.
    """

    names: tuple[str, ...]  # of the shards, without their folders
    sizes: np.ndarray  # (s,) int64, bytes of the shards
    stamps: np.ndarray  # (s,) int64, see `shards.Identity`; NO_STAMP where unknown
    ends: np.ndarray  # (s,) int64, samples up to the end of each shard
    keys_ends: np.ndarray  # (s,) int64, bytes of `keys_bytes` up to the end of each shard
    image_bytes: np.ndarray  # (s,) int64, of all images of a shard together
    digests: np.ndarray  # (s, 32) uint8, see `digest`
    findings: Mapping[int, Findings]  # by shard, of those with any
    image_blocks: np.ndarray  # (n,) unsigned
    image_sizes: np.ndarray  # (n,) unsigned, bytes
    labels: np.ndarray  # (n,) signed, NO_LABEL where there is none
    key_ends: np.ndarray  # (n,) unsigned, within the shard's keys
    json_blocks: np.ndarray  # (n,) or (0,) unsigned
    json_sizes: np.ndarray  # (n,) or (0,) unsigned, 0 where there is no json
    mask_blocks: np.ndarray  # likewise, of `KEY.mask.png`
    mask_sizes: np.ndarray
    depth_blocks: np.ndarray  # of `KEY.depth.png` or `KEY.depth.npy`
    depth_sizes: np.ndarray
    text_blocks: np.ndarray  # of `KEY.txt`, captions
    text_sizes: np.ndarray
    keys_bytes: np.ndarray  # uint8, the keys one after the other, UTF-8; other bytes as in the tar
    knows_maps: bool = True  # False: written by a version that did not look for masks and depths
    knows_texts: bool = True  # nor for captions
    file: Any = None  # the open one that is mapped, if one is

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard: (s,) int64."""
        return np.diff(self.ends, prepend=0)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys; for few shards, as every one becomes an object."""
        return tuple(
            self.entry(shard, row).key for shard, count in enumerate(self.counts.tolist()) for row in range(count)
        )

    @property
    def image_offsets(self) -> np.ndarray:
        """(n,) int64, bytes from the start of the tar."""
        return self.image_blocks.astype(np.int64) * BLOCK

    @property
    def problems(self) -> tuple[str, ...]:
        """Of all shards."""
        return tuple(problem for found in self.findings.values() for problem in found.problems)

    @property
    def has_json(self) -> bool:
        return self.has("json")

    def has(self, kind: str) -> bool:
        """Whether any sample has such a member, of `BESIDE`."""
        return len(getattr(self, f"{kind}_sizes")) > 0

    def digest(self, shard: int) -> str:
        """The hash over keys, offsets, sizes and labels that stands for what a shard holds."""
        return self.digests[shard].tobytes().hex()

    def identity(self, shard: int) -> Identity:
        """Of the shard when it was indexed."""
        stamp = int(self.stamps[shard])
        return Identity(int(self.sizes[shard]), None if stamp == NO_STAMP else stamp)

    def entry(self, shard: int, row: int) -> IndexEntry:
        """Sample number `row` of a shard.

        Raises:
            DamageError: What is stored of it does not lie in the shard.
        """
        place = (self.ends.item(shard - 1) if shard else 0) + row
        first_key = self.keys_ends.item(shard - 1) if shard else 0
        begin, end = (self.key_ends.item(place - 1) if row else 0), self.key_ends.item(place)
        offset, size = self.image_blocks.item(place) * BLOCK, self.image_sizes.item(place)
        label = self.labels.item(place)
        json_offset = json_size = 0
        if self.has_json:
            json_offset, json_size = self.json_blocks.item(place) * BLOCK, self.json_sizes.item(place)
        limit = self.sizes.item(shard)
        inside = offset + size <= limit and json_offset + json_size <= limit
        if not (inside and begin <= end <= self.keys_ends.item(shard) - first_key and label >= NO_LABEL):
            raise self._damage(shard, row)
        key = self.keys_bytes[first_key + begin : first_key + end].tobytes().decode("utf-8", "surrogateescape")
        return IndexEntry(key, offset, size, label, json_offset, json_size)

    def beside(self, kind: str, shard: int, row: int) -> tuple[int, int]:
        """Where the member of a kind, of `BESIDE`, of sample `row` of a shard lies: first byte and bytes, (0, 0) where
        there is none.

        Raises:
            DamageError: It does not lie in the shard.
        """
        if not self.has(kind):
            return 0, 0
        place = (self.ends.item(shard - 1) if shard else 0) + row
        offset = getattr(self, f"{kind}_blocks").item(place) * BLOCK
        size = getattr(self, f"{kind}_sizes").item(place)
        if offset + size > self.sizes.item(shard):
            raise self._damage(shard, row)
        return offset, size

    def _damage(self, shard: int, row: int) -> DamageError:
        return DamageError(
            f"the index of {self.names[shard]} is damaged at its sample {row}; remove the .index files beside the "
            "shards, and it is built again"
        )

    def part(self, shard: int) -> Index:
        """The index of one of the shards."""
        samples = slice(int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard]))
        keys = slice(int(self.keys_ends[shard - 1]) if shard else 0, int(self.keys_ends[shard]))
        one = slice(shard, shard + 1)
        return Index(
            names=self.names[one],
            sizes=self.sizes[one],
            stamps=self.stamps[one],
            ends=np.array([samples.stop - samples.start]),
            keys_ends=np.array([keys.stop - keys.start]),
            image_bytes=self.image_bytes[one],
            digests=self.digests[one],
            findings={0: self.findings[shard]} if shard in self.findings else {},
            keys_bytes=self.keys_bytes[keys],
            knows_maps=self.knows_maps,
            knows_texts=self.knows_texts,
            **{name: getattr(self, name)[samples] for name in PER_SAMPLE},
        )

    def is_sound(self) -> bool:
        """Whether every entry of every shard lies in its shard, and the digests are those of the entries."""
        return all(_is_sound(self.part(shard)) for shard in range(len(self.names)))


def one_shard(
    name: str,
    identity: Identity,
    keys: bytes,
    arrays: Mapping[str, np.ndarray],
    findings: Findings,
) -> Index:
    """The index of one shard from what was read of it; `arrays` are those with an entry a sample, as int64. What none
    has beside its image may be missing."""
    none = np.zeros(0, np.int64)
    there = [kind for kind in BESIDE if arrays.get(f"{kind}_sizes", none).any()]
    kept = {*_ALWAYS, *(f"{kind}_{what}" for kind in there for what in ("blocks", "sizes"))}
    narrow = {name: _narrowed(arrays[name] if name in kept else none, signed=name == "labels") for name in PER_SAMPLE}
    keys_bytes = np.frombuffer(keys, np.uint8)
    return Index(
        names=(name,),
        sizes=np.array([identity.size]),
        stamps=np.array([NO_STAMP if identity.stamp is None else identity.stamp]),
        ends=np.array([len(arrays["labels"])]),
        keys_ends=np.array([len(keys)]),
        image_bytes=np.array([int(arrays["image_sizes"].sum())]),
        digests=np.frombuffer(_digest(keys_bytes, narrow), np.uint8)[None],
        findings={} if findings == Findings() else {0: findings},
        keys_bytes=keys_bytes,
        **narrow,  # type: ignore[arg-type]
    )


def _is_sound(index: Index) -> bool:
    limit = int(index.sizes[0])
    for kind in ("image", *BESIDE):
        blocks, sizes = getattr(index, f"{kind}_blocks"), getattr(index, f"{kind}_sizes")
        for piece in _pieces(len(sizes)):  # as floats, which are exact up to sizes of files and do not wrap around
            if (blocks[piece].astype(np.float64) * BLOCK + sizes[piece].astype(np.float64) > limit).any():
                return False
    return (
        all((index.labels[piece] >= NO_LABEL).all() for piece in _pieces(len(index)))
        and all(_rises(index.key_ends[max(0, piece.start - 1) : piece.stop]) for piece in _pieces(len(index)))
        and (not len(index) or int(index.key_ends[-1]) == len(index.keys_bytes))
        and _digest(index.keys_bytes, {name: getattr(index, name) for name in PER_SAMPLE}) == index.digests[0].tobytes()
    )


def _digest(keys_bytes: np.ndarray, arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for piece in _pieces(len(keys_bytes)):
        digest.update(keys_bytes[piece].tobytes())
    for kind in ("", *BESIDE):
        sizes = arrays[f"{kind}_sizes"] if kind else np.ones(1)
        if not any(sizes[piece].any() for piece in _pieces(len(sizes))):
            continue  # joined with shards that have some, others get zeros
        digest.update(b"" if kind in ("", "json") else kind.encode())
        for name in (f"{kind}_blocks", f"{kind}_sizes") if kind else _ALWAYS:
            for piece in _pieces(len(arrays[name])):
                digest.update(arrays[name][piece].astype("<i8").tobytes())
    return digest.digest()


def _pieces(length: int) -> Iterator[slice]:
    return (slice(first, first + _PIECE) for first in range(0, length, _PIECE))


def _rises(values: np.ndarray) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _narrowed(values: np.ndarray, signed: bool) -> np.ndarray:
    small = "<i4" if signed else "<u4"
    fits = not len(values) or int(values.max()) <= np.iinfo(small).max
    return values.astype(small if fits else "<i8" if signed else "<u8")
