"""The index of a shard, made or found: what of it is a sample, and what is none or doubtful, by its headers and labels.

An index is built once per shard and kept beside it, or in the user's cache when that folder is read-only. It is rebuilt
when the shard's size or time of change differs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.images.issues import Severity
from data_pipelines.images.tally import Tally
from data_pipelines.shards.index import NO_LABEL, DamageError, Findings, Index, one_shard
from data_pipelines.shards.index_format import read_index, store, write_joined
from data_pipelines.shards.shard import Identity, identify, open_shard
from data_pipelines.shards.tar import BLOCK, Member, Special, TarDamageError, Trailing, walk

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "npy")
_MAX_LABEL_BYTES = 32
_MAX_USUAL_NAME = 255  # letters; longer ones are told
_NO_IMAGE = -1
# WebDataset's rules: a key ends at the first dot of the base name; names in double underscores are its own, and what
# begins with a dot, such as the ._img.jpg of Macs, is no sample
MEMBER_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
META_NAME = re.compile(r"__[^/]*__($|/)")


@dataclass(slots=True)
class _Entry:
    """What the members of one key hold; places are (block, bytes)."""

    key: str
    image: tuple[int, int] = (_NO_IMAGE, 0)
    image_rank: int = 0  # see `image_rank`
    label: int = NO_LABEL
    has_label: bool = False
    json: tuple[int, int] = (0, 0)
    image_field: str = ""  # what stands between the first dot of the image's name and its suffix
    labels: dict[str, int | None] = field(default_factory=dict)  # by such a field: a.b.c.cls is of a.b.c.jpg
    jsons: dict[str, tuple[int, int]] = field(default_factory=dict)

    def settle(self) -> bool:
        """Take label and json of the image's own name, where the key has none; whether that label is none."""
        if not self.json[1]:
            self.json = self.jsons.get(self.image_field, (0, 0))
        if self.has_label or self.image_field not in self.labels:
            return False
        label = self.labels[self.image_field]
        self.label, self.has_label = NO_LABEL if label is None else label, True
        return label is None


_Dotted = tuple[str, dict[str, int | None], dict[str, tuple[int, int]]]


class _Rows:
    """The entries found so far, some 60 bytes each: a shard may hold ten million."""

    def __init__(self) -> None:
        self.keys = bytearray()
        self.key_ends = array("q")
        self.hashes = array("q")
        self.numbers = array("q")  # image block and bytes, label, json block and bytes, image_rank, has_label
        self.dotted: dict[int, _Dotted] = {}  # of rows whose members have dotted names: their fields, to be settled

    def __len__(self) -> int:
        return len(self.hashes)

    def append(self, entry: _Entry) -> None:
        self.keys += entry.key.encode("utf-8", "surrogateescape")
        self.key_ends.append(len(self.keys))
        self.hashes.append(hash(entry.key))
        self.numbers.extend(_numbers(entry))
        self._keep_fields(len(self) - 1, entry)

    def key(self, row: int) -> str:
        begin = self.key_ends[row - 1] if row else 0
        return self.keys[begin : self.key_ends[row]].decode("utf-8", "surrogateescape")

    def entry(self, row: int) -> _Entry:
        block, size, label, json_block, json_size, rank, has_label = self.numbers[7 * row : 7 * row + 7]
        plain = (self.key(row), (block, size), rank, label, bool(has_label), (json_block, json_size))
        return _Entry(*plain, *self.dotted.get(row, ("", {}, {})))

    def put(self, row: int, entry: _Entry) -> None:
        self.numbers[7 * row : 7 * row + 7] = array("q", _numbers(entry))
        self._keep_fields(row, entry)

    def _keep_fields(self, row: int, entry: _Entry) -> None:
        if entry.image_field or entry.labels or entry.jsons:
            self.dotted[row] = (entry.image_field, entry.labels, entry.jsons)

    def repeats(self) -> list[tuple[int, int]]:
        """(row of the first, later row) for keys whose members do not lie together, in the order of the later."""
        hashes = np.frombuffer(self.hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        first: dict[str, int] = {}
        found = []
        for row in sorted({*order[1:][same].tolist(), *order[:-1][same].tolist()}):
            earlier = first.setdefault(self.key(row), row)
            if earlier != row:
                found.append((earlier, row))
        return found


def _numbers(entry: _Entry) -> tuple[int, ...]:
    return (*entry.image, entry.label, *entry.json, entry.image_rank, entry.has_label)


def scan_shard(shard: Path) -> tuple[Index, Tally]:
    """Read a shard's headers and labels: its samples, and what was found on the way.

    A sample is a key with an image. Of several images, labels or json under one key the first counts (a plain suffix
    before a compound one such as `depth.png`). An `.npy` array is the image only where nothing else is, for it may as
    well be features or a mask. Of an archive cut short, everything before the cut.

    Raises:
        OSError: The file system fails.
    """
    rows, tally, damage = _Rows(), Tally(), ""
    entry: _Entry | None = None
    identity = identify(shard)
    with os.fdopen(open_shard(shard), "rb") as file:
        try:
            for item in walk(file):
                if isinstance(item, Trailing):
                    trailing = "more_after_end" if item.is_tar else "junk_after_end"
                    tally.add(trailing, shard.name, None, f"at byte {item.offset}")
                    continue
                match = MEMBER_NAME.match(item.name)
                if match is None or META_NAME.search(item.name):
                    if isinstance(item, Member) and item.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                        tally.add("no_key", shard.name, item.name)
                    continue
                if isinstance(item, Special):
                    tally.add("special_member", shard.name, item.name, item.kind)
                    continue
                if _is_odd(item.name):
                    tally.add("odd_name", shard.name, item.name)
                if entry is None or entry.key != match[1]:
                    if entry is not None:
                        rows.append(entry)
                    entry = _Entry(match[1])
                case = _enter(entry, match[2].lower(), item, file.fileno())
                if case is not None:
                    tally.add(case, shard.name, item.name)
        except TarDamageError as error:
            damage = error.case
            tally.add(error.case, shard.name, None, str(error))
    if entry is not None:
        rows.append(entry)
    merged = rows.repeats()
    for first, later in merged:
        num_repeated = _merge(rows, first, later)
        if num_repeated:
            tally.add("repeated_member", shard.name, rows.key(later), "the members of its key lie apart", num_repeated)
    for row in list(rows.dotted):
        entry = rows.entry(row)
        if entry.settle():
            tally.add("bad_label", shard.name, f"{entry.key}.{entry.image_field}.cls")
        rows.put(row, entry)
    kept = np.ones(len(rows), dtype=bool)
    kept[[later for _, later in merged]] = False
    without_image = kept & (np.frombuffer(rows.numbers, np.int64).reshape(-1, 7)[:, 0] == _NO_IMAGE)
    for row in np.flatnonzero(without_image).tolist():
        tally.add("no_image", shard.name, rows.key(row))
    if not (kept & ~without_image).any() and damage != "not_a_tar":
        tally.add("empty_shard", shard.name)
    findings = Findings(
        tuple(tally.sentence(case, with_shard=False) for case in tally.of(Severity.ERROR)),
        num_without_image=tally.counts["no_image"],
        num_duplicates=tally.counts["repeated_member"],
        num_bad_labels=tally.counts["bad_label"],
        truncated=bool(damage),
    )
    return _finished(shard.name, identity, rows, kept & ~without_image, findings), tally


def _enter(entry: _Entry, suffix: str, member: Member, descriptor: int) -> str | None:
    """Take a member into its sample; the case if something is wrong with it."""
    place = (member.offset // BLOCK, member.size)
    name_of_field, _, kind = suffix.rpartition(".")
    if kind in IMAGE_SUFFIXES:
        is_second = _is_second_image(entry, place, image_rank(suffix))
        entry.image_field = name_of_field if entry.image == place else entry.image_field
        return "repeated_member" if is_second else None
    if kind == "cls" and name_of_field:
        label = _label(os.pread(descriptor, min(member.size, _MAX_LABEL_BYTES + 1), member.offset))
        entry.labels.setdefault(name_of_field, label)
        return None
    if suffix == "cls":
        if entry.has_label:
            return "repeated_member"
        label = _label(os.pread(descriptor, min(member.size, _MAX_LABEL_BYTES + 1), member.offset))
        entry.label, entry.has_label = NO_LABEL if label is None else label, True
        return "bad_label" if label is None else None
    if kind == "json" and name_of_field:
        entry.jsons.setdefault(name_of_field, place)
        return None
    if suffix == "json":
        if entry.json[1]:
            return "repeated_member"
        entry.json = place
    return None


def image_rank(suffix: str) -> int:
    """Which of a key's images goes first: a plain suffix (3) before a compound one (2), arrays last (1 and 0)."""
    return 2 * (not suffix.endswith("npy")) + (suffix in IMAGE_SUFFIXES)


def _is_second_image(entry: _Entry, place: tuple[int, int], rank: int) -> bool:
    """Whether it is one too many; arrays never are, for several beside an image are usual."""
    if entry.image[0] == _NO_IMAGE or rank > entry.image_rank:
        entry.image, entry.image_rank = place, rank
        return False
    return rank == entry.image_rank and rank >= 2


def _merge(rows: _Rows, first: int, later: int) -> int:
    """Take into the first row of a key what a later one adds; the number of members that are not used."""
    entry, other = rows.entry(first), rows.entry(later)
    num_repeated = int(other.image[0] != _NO_IMAGE and _is_second_image(entry, other.image, other.image_rank))
    num_repeated += entry.has_label and other.has_label
    num_repeated += bool(entry.json[1] and other.json[1])
    if entry.image == other.image:
        entry.image_field = other.image_field
    if not entry.has_label:
        entry.label, entry.has_label = other.label, other.has_label
    if not entry.json[1]:
        entry.json = other.json
    entry.labels = {**other.labels, **entry.labels}
    entry.jsons = {**other.jsons, **entry.jsons}
    rows.dotted.pop(later, None)
    rows.put(first, entry)
    return num_repeated


def _label(text: bytes) -> int | None:
    stripped = text.strip()
    return int(stripped) if len(text) <= _MAX_LABEL_BYTES and stripped.isdigit() and len(stripped) < 19 else None


def _is_odd(name: str) -> bool:
    return not name.isprintable() or name[0] == "/" or ".." in name.split("/") or len(name) > _MAX_USUAL_NAME


def _finished(name: str, identity: Identity, rows: _Rows, kept: np.ndarray, findings: Findings) -> Index:
    numbers = np.frombuffer(rows.numbers, np.int64).reshape(-1, 7)
    key_ends = np.frombuffer(rows.key_ends, np.int64)
    keys = bytes(rows.keys)
    if not kept.all():
        lengths = np.diff(key_ends, prepend=0)
        keys = np.frombuffer(keys, np.uint8)[np.repeat(kept, lengths)].tobytes()
        key_ends, numbers = np.cumsum(lengths[kept]), numbers[kept]
    columns = ("image_blocks", "image_sizes", "labels", "json_blocks", "json_sizes")
    arrays = {column: numbers[:, place] for place, column in enumerate(columns)}
    return one_shard(name, identity, keys, {**arrays, "key_ends": key_ends}, findings)


INDEX_SUFFIX = ".index"
_log = logging.getLogger(__name__)


def build_index(shard: Path) -> Index:
    """Read a shard's headers and labels; what a sample is, says `scan_shard`."""
    return scan_shard(shard)[0]


def load_index(shard: Path) -> Index:
    """The stored index of a shard, or a new one, which is then stored where that is possible."""
    found = find_index(shard, identify(shard))
    return found if isinstance(found, Index) else read_index(found)


def find_index(shard: Path, identity: Identity, *, thorough: bool = True) -> Path | Index:
    """The file of a shard's index, built if there is none; the index itself where there is no place for a file.

    Args:
        shard: The tar.
        identity: Of the tar as it is now.
        thorough: Look at every entry of a stored index, not at its tables only.
    """
    places = _places(shard, identity)
    for place in places:
        try:
            index = read_index(place)
        except (OSError, DamageError):
            continue
        if len(index.names) == 1 and fits(index, 0, shard, identity) and (not thorough or index.is_sound()):
            return place
    index = build_index(shard)
    for problem in index.problems:
        _log.warning("%s: %s", shard, problem)
    for place in places:
        if store(place, lambda file: write_joined(file, [lambda: index])):
            return place
    _log.warning("no place to keep the index of %s; set SELFSIGHT_CACHE to a folder that can be written to", shard)
    return index


def fits(index: Index, number: int, shard: Path, identity: Identity) -> bool:
    """Whether shard `number` of a stored index is `shard`, unchanged."""
    stored = index.identity(number)
    same_stamp = identity.stamp is None or stored.stamp is None or identity.stamp == stored.stamp
    return index.names[number] == shard.name and stored.size == identity.size and same_stamp


def _places(shard: Path, identity: Identity) -> tuple[Path, Path]:
    """Beside the shard, then in the user's cache under a name that holds the shard's path, size and time."""
    text = f"{shard.resolve()}\0{identity.size}\0{identity.stamp}".encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(text).hexdigest()
    return shard.with_name(shard.name + INDEX_SUFFIX), index_cache() / (digest[:32] + INDEX_SUFFIX)


def index_cache() -> Path:
    """The folder of the user's own in which indexes are kept that have no place beside their shards."""
    cache = Path(os.environ.get("SELFSIGHT_CACHE") or Path.home() / ".cache" / "selfsight")
    return cache / "index"
