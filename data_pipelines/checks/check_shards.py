"""What `selfsight verify` checks of shards beside their images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.datasets.dataset_index import is_true, joint_place
from data_pipelines.datasets.description import read_description
from data_pipelines.files import parse_json
from data_pipelines.images.sample import KINDS
from data_pipelines.images.tally import Tally
from data_pipelines.shards.index import NO_LABEL, Index
from data_pipelines.shards.scan import INDEX_SUFFIX, load_index, scan_shard

_KEYS_AT_A_TIME = 1 << 24  # 128 MB of hashes
_NUM_NAMED = 20  # repeated keys
_MAX_JSON_BYTES = 1 << 20  # longer ones are not looked at


class ListedShard(NamedTuple):
    """What `dataset.json` says of a shard."""

    samples: int
    sha256: str


class ListedSplit(NamedTuple):
    """What it says of a split."""

    shards: list[str]
    class_counts: list[int] | None


@dataclass(frozen=True)
class Listed:
    """What `dataset.json` says; empty where there is none, or none that `selfsight pack` wrote."""

    shards: dict[str, ListedShard]
    splits: dict[str, ListedSplit]
    num_classes: int | None

    @classmethod
    def in_folder(cls, folder: Path) -> Listed:
        """Raises ValueError if the file is not of the form that `selfsight pack` writes."""
        info = read_description(folder) or {}
        shards, splits = {}, {}
        try:
            for name, split in info.get("splits", {}).items():
                counts = split.get("class_counts")
                splits[name] = ListedSplit([entry["name"] for entry in split["shards"]], counts and [*map(int, counts)])
                for entry in split["shards"]:
                    shards[str(entry["name"])] = ListedShard(int(entry["samples"]), str(entry["sha256"]))
            classes = info.get("classes")
            return cls(shards, splits, len(classes) if classes else None)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'dataset.json'} is not as `selfsight pack` writes it ({type(error).__name__}: {error}); "
                "pack the data again, or remove the file"
            ) from error


class ShardFacts(NamedTuple):
    """What is kept of a shard until all are compared."""

    shard: Path
    size: int  # bytes
    num_samples: int
    digest: str  # equal for shards whose samples have equal keys, places, sizes and labels
    sha256: str | None  # where it was needed
    state: str = "whole"  # or "damaged", where it may have held more samples, or "unreadable"


class ShardCheck(NamedTuple):
    """What was found in one shard; `samples` is None where the file system did not give it."""

    facts: ShardFacts
    samples: Index | None
    tally: Tally
    labels: Counter[int]
    num_unlabelled: int  # samples without a .cls; those with a bad one are told apart


def check_shard(shard: Path, listed: Listed, quick: bool) -> ShardCheck:
    """Read the headers, labels and metadata of a shard, and compare with its index and with `dataset.json`.

    Unless `quick`, the bytes are compared with their checksum there as well. What the file system does not give is
    found, not raised.
    """
    try:
        return _check_shard(shard, listed, quick)
    except OSError as error:
        return unreadable(shard, error)


def unreadable(shard: Path, error: OSError) -> ShardCheck:
    """What is found in a shard that the file system, or the place it is fetched from, does not give."""
    tally = Tally()
    tally.add("unreadable", shard.name, None, str(error))
    return ShardCheck(ShardFacts(shard, 0, 0, "", None, "unreadable"), None, tally, Counter(), 0)


def _check_shard(shard: Path, listed: Listed, quick: bool) -> ShardCheck:
    index, tally = scan_shard(shard)
    size = shard.stat().st_size
    _check_index(shard, index, tally)
    _check_json(shard, index, tally)
    labels = Counter(index.labels.tolist())
    num_unlabelled = max(0, labels.pop(NO_LABEL, 0) - tally.counts["bad_label"])
    sha256, entry = None, listed.shards.get(shard.name)
    if listed.num_classes is not None:
        for row in np.flatnonzero(index.labels >= listed.num_classes).tolist():
            told = f"label {int(index.labels[row])} of {listed.num_classes} classes"
            tally.add("label_out_of_range", shard.name, index.entry(0, row).key, told)
    if entry is not None:
        if entry.samples != len(index):
            tally.add("other_counts", shard.name, None, f"{len(index)} samples, {entry.samples} were packed")
        if not quick:
            sha256 = _sha256(shard)
            if sha256 != entry.sha256:
                tally.add("other_bytes", shard.name, None, "fetch it or pack it again")
    state = "damaged" if 0 in index.findings and index.findings[0].truncated else "whole"
    facts = ShardFacts(shard, size, len(index), index.digest(0), sha256, state)
    return ShardCheck(facts, index, tally, labels, num_unlabelled)


def _check_index(shard: Path, fresh: Index, tally: Tally) -> None:
    """Whether the index beside the shard was there, up to date and true."""
    place = shard.with_name(shard.name + INDEX_SUFFIX)
    before = place.stat().st_mtime_ns if place.is_file() else None
    stored = load_index(shard)  # builds and stores it where it is stale
    if before is not None and place.stat().st_mtime_ns != before:
        tally.add("stale_index", shard.name)
    if stored.digest(0) != fresh.digest(0):
        tally.add("foreign_index", shard.name, None, f"remove {place.name}")
    joint = joint_place(shard.parent, shard.name.rpartition("-")[0])
    if not is_true(joint, shard, fresh):
        tally.add("foreign_index", shard.name, None, f"remove {joint.name}")


def _check_json(shard: Path, index: Index, tally: Tally) -> None:
    if not index.has_json:
        return
    with shard.open("rb") as file:
        for row in np.flatnonzero((index.json_sizes > 0) & (index.json_sizes <= _MAX_JSON_BYTES)).tolist():
            entry = index.entry(0, row)
            try:
                parse_json(os.pread(file.fileno(), entry.json_size, entry.json_offset))
            except ValueError as error:
                tally.add("bad_json", shard.name, entry.key, str(error))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


class Census:
    """What all shards hold together, in little memory: their samples are forgotten one after the other."""

    def __init__(self, folder: Path, listed: Listed) -> None:
        self.tally = Tally()  # of the shards one by one
        self.facts: list[ShardFacts] = []
        self.num_labelled = 0
        self._folder, self._listed = folder, listed
        self._split_of = {name: split for split, entry in listed.splits.items() for name in entry.shards}
        self._labels: dict[str, Counter[int]] = {split: Counter() for split in listed.splits}
        self._unlabelled = Tally()
        self._without_map = {kind: Tally() for kind in KINDS}
        self._num_maps: Counter[str] = Counter()

    def add(self, check: ShardCheck) -> None:
        """Count a shard in."""
        name = check.facts.shard.name
        self.facts.append(check.facts)
        self.tally.update(check.tally)
        self.num_labelled += check.labels.total()
        if check.num_unlabelled:
            self._unlabelled.add("no_label", name, None, None, check.num_unlabelled)
        for kind in KINDS if check.samples is not None else ():
            num_maps = int(np.count_nonzero(getattr(check.samples, f"{kind}_sizes")))
            self._num_maps[kind] += num_maps
            if num_maps < check.facts.num_samples:
                missing = check.facts.num_samples - num_maps
                self._without_map[kind].add("no_map", name, None, f"without a {kind}", missing)
        if name in self._split_of:
            self._labels[self._split_of[name]].update(check.labels)

    @property
    def num_samples(self) -> int:
        return sum(facts.num_samples for facts in self.facts)

    def compare(self) -> Tally:
        """What `dataset.json` says otherwise, samples without a label among labelled ones, and what is there twice."""
        tally, listed = Tally(), self._listed
        there = {facts.shard.name for facts in self.facts if facts.shard.parent == self._folder}
        for name in listed.shards:
            if not (self._folder / name).is_file():
                tally.add("missing_shard", name)
        for name in sorted(there) if listed.shards else ():
            if name not in listed.shards:
                tally.add("unlisted_shard", name)
        for split, (names, counts) in listed.splits.items():
            if counts is None or not there >= set(names):
                continue
            found = self._labels[split]
            wrong = [label for label, count in enumerate(counts) if found[label] != count]
            if wrong:
                told = f"class {wrong[0]} has {found[wrong[0]]} samples, {counts[wrong[0]]} were packed"
                tally.add("other_counts", split, None, told, len(wrong))
        if self.num_labelled:
            tally.update(self._unlabelled)
        for kind in KINDS:
            if self._num_maps[kind]:
                tally.update(self._without_map[kind])
        tally.update(same_shards(self.facts))
        tally.update(repeated_keys(self.facts))
        return tally


def same_shards(shards: Iterable[ShardFacts]) -> Tally:
    """Shards of the same bytes, which may lie in different splits."""
    tally, alike = Tally(), defaultdict(list)
    for facts in shards:
        if facts.num_samples:
            alike[facts.size, facts.digest].append(facts)
    for group in alike.values():
        first: dict[str, Path] = {}
        for facts in group if len(group) > 1 else ():
            earlier = first.setdefault(facts.sha256 or _sha256(facts.shard), facts.shard)
            if earlier != facts.shard:
                tally.add("same_shard", facts.shard.name, None, f"as {earlier.name}")
    return tally


def repeated_keys(found: Sequence[ShardFacts]) -> Tally:
    """Keys that several shards have, in as many passes over the indexes as memory asks for.

    Keys count as equal where 64 bits of a hash of them are: of 100 million keys, all different, two are with a
    probability of 3e-4.
    """
    shards = [facts.shard for facts in found if facts.num_samples]
    num_passes = -(-sum(facts.num_samples for facts in found) // _KEYS_AT_A_TIME)
    num_repeated, some = 0, set[int]()
    for number in range(num_passes):
        parts = [_hashes(shard, number, num_passes) for shard in shards]
        hashes, counts = np.unique(np.concatenate(parts), return_counts=True)
        num_repeated += int((counts - 1).sum())
        some.update(hashes[counts > 1][:_NUM_NAMED].tolist())
    tally, first = Tally(), dict[int, str]()
    for shard in shards if some else ():
        for key in _keys(shard):
            if hash(key) in some and first.setdefault(hash(key), shard.name) != shard.name:
                told = f"also in {first[hash(key)]}"
                tally.add("repeated_key", shard.name, key.decode("utf-8", "surrogateescape"), told, num_repeated)
                num_repeated = 0  # counted
    return tally


def _hashes(shard: Path, remainder: int, divisor: int) -> np.ndarray:
    found = np.array([hash(key) for key in _keys(shard)], np.int64)
    return found[found % divisor == remainder]


def _keys(shard: Path) -> list[bytes]:
    index = load_index(shard)
    keys, ends = index.keys_bytes.tobytes(), index.key_ends.tolist()
    return [keys[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
