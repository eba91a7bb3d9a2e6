"""The index of a shard, made or found: what of it is a sample, and what is none or doubtful, by its headers and labels.

An index is built once per shard and kept beside it, or in the user's cache when that folder is read-only. It is rebuilt
when the shard's size or time of change differs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import numpy as np

from data_pipelines.images.issues import Severity
from data_pipelines.images.sample import MapName, map_name
from data_pipelines.images.tally import Tally
from data_pipelines.shards.entries import COLUMNS, NO_IMAGE, Entry, Rows
from data_pipelines.shards.index import NO_LABEL, DamageError, Findings, Index, one_shard
from data_pipelines.shards.index_format import read_index, store, write_joined
from data_pipelines.shards.shard import Identity, identify, open_shard
from data_pipelines.shards.tar import BLOCK, Member, Special, TarDamageError, Trailing, walk

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "npy")
_MAX_LABEL_BYTES = 32
_MAX_USUAL_NAME = 255  # letters; longer ones are told
# WebDataset's rules: a key ends at the first dot of the base name; names in double underscores are its own, and what
# begins with a dot, such as the ._img.jpg of Macs, is no sample
MEMBER_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
#: Of a member behind its key: the number of a frame of a stack, as in KEY.000.jpg.
FRAME_NUMBER = re.compile(r"[0-9]{1,9}")
META_NAME = re.compile(r"__[^/]*__($|/)")


def scan_shard(shard: Path) -> tuple[Index, Tally]:
    """Read a shard's headers and labels: its samples, and what was found on the way.

    A sample is a key with an image. Of several images, labels or json under one key the first counts (a plain suffix
    before a compound one such as `left.png`). What `images.maps` names, such as `KEY.mask.png`, lies beside the image;
    it is the image only where nothing else is. An `.npy` array is the image only where nothing else is, for it may as
    well be features or a mask. Several numbered images, `KEY.000.jpg`, `KEY.001.jpg` and so on, are the frames of a
    stack: the image is then the part of the tar from the first of them to the last, see `images.stacks`. Of an archive
    cut short, everything before the cut.

    Raises:
        OSError: The file system fails.
    """
    rows, tally, damage = Rows(), Tally(), ""
    entry: Entry | None = None
    identity, end_of_last = identify(shard), 0
    with os.fdopen(open_shard(shard), "rb") as file:
        try:
            for item in walk(file):
                if isinstance(item, Trailing):
                    trailing = "more_after_end" if item.is_tar else "junk_after_end"
                    tally.add(trailing, shard.name, None, f"at byte {item.offset}")
                    continue
                begin = end_of_last
                if isinstance(item, Member):
                    end_of_last = item.offset + -(-item.size // BLOCK) * BLOCK
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
                    entry = Entry(match[1])
                case = _enter(entry, match[2].lower(), item, file.fileno(), begin)
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
    without_image = kept & (rows.table()[:, 0] == NO_IMAGE)
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


def _enter(entry: Entry, suffix: str, member: Member, descriptor: int, begin: int) -> str | None:
    """Take a member, whose headers begin at byte `begin` or later, into its sample; the case if something is wrong with
    it."""
    place = (member.offset // BLOCK, member.size)
    name_of_field, _, kind = suffix.rpartition(".")
    if kind in IMAGE_SUFFIXES:
        if (named := map_name(suffix)) is not None:
            _enter_map(entry, named, place)
        if FRAME_NUMBER.fullmatch(name_of_field) and _is_further_frame(entry, member, image_rank(suffix), begin):
            return None
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
    if kind == "txt" and name_of_field:
        entry.texts.setdefault(name_of_field, place)
    elif suffix == "txt":
        if entry.text[1]:
            return "repeated_member"
        entry.text = place
    return None


def _enter_map(entry: Entry, named: MapName, place: tuple[int, int]) -> None:
    if named.field:
        (entry.masks if named.kind == "mask" else entry.depths).setdefault(named.field, place)
    elif named.kind == "mask":
        entry.mask = entry.mask if entry.mask[1] else place
    else:
        entry.depth = entry.depth if entry.depth[1] else place


def image_rank(suffix: str) -> int:
    """Which of a key's images goes first: a plain suffix (3) before a compound one (2), arrays (1 and 0), and last what
    is named as a map (-1)."""
    if map_name(suffix) is not None:
        return -1
    return 2 * (not suffix.endswith("npy")) + (suffix in IMAGE_SUFFIXES)


def _is_second_image(entry: Entry, place: tuple[int, int], rank: int) -> bool:
    """Whether it is one too many; arrays never are, for several beside an image are usual."""
    if entry.image[0] == NO_IMAGE or rank > entry.image_rank:
        entry.image, entry.image_rank = place, rank
        return False
    return rank == entry.image_rank and rank >= 2


def _is_further_frame(entry: Entry, member: Member, rank: int, begin: int) -> bool:
    """Whether a numbered image goes on with the stack that an earlier one has begun; the image is then all of it."""
    if entry.image[0] == NO_IMAGE or rank > entry.image_rank:
        entry.frames_from = begin
        return False
    if entry.frames_from is None or rank != entry.image_rank:
        return False
    entry.image = (entry.frames_from // BLOCK, member.offset + member.size - entry.frames_from)
    return True


def _merge(rows: Rows, first: int, later: int) -> int:
    """Take into the first row of a key what a later one adds; the number of members that are not used."""
    entry, other = rows.entry(first), rows.entry(later)
    num_repeated = int(other.image[0] != NO_IMAGE and _is_second_image(entry, other.image, other.image_rank))
    num_repeated += entry.has_label and other.has_label
    num_repeated += bool(entry.json[1] and other.json[1]) + bool(entry.text[1] and other.text[1])
    if entry.image == other.image:
        entry.image_field = other.image_field
    if not entry.has_label:
        entry.label, entry.has_label = other.label, other.has_label
    if not entry.json[1]:
        entry.json = other.json
    entry.mask = entry.mask if entry.mask[1] else other.mask
    entry.depth = entry.depth if entry.depth[1] else other.depth
    entry.text = entry.text if entry.text[1] else other.text
    entry.labels = {**other.labels, **entry.labels}
    entry.jsons = {**other.jsons, **entry.jsons}
    entry.masks = {**other.masks, **entry.masks}
    entry.depths = {**other.depths, **entry.depths}
    entry.texts = {**other.texts, **entry.texts}
    rows.dotted.pop(later, None)
    rows.put(first, entry)
    return num_repeated


def _label(text: bytes) -> int | None:
    stripped = text.strip()
    return int(stripped) if len(text) <= _MAX_LABEL_BYTES and stripped.isdigit() and len(stripped) < 19 else None


def _is_odd(name: str) -> bool:
    return not name.isprintable() or name[0] == "/" or ".." in name.split("/") or len(name) > _MAX_USUAL_NAME


def _finished(name: str, identity: Identity, rows: Rows, kept: np.ndarray, findings: Findings) -> Index:
    numbers = rows.table()
    key_ends = np.frombuffer(rows.key_ends, np.int64)
    keys = bytes(rows.keys)
    if not kept.all():
        lengths = np.diff(key_ends, prepend=0)
        keys = np.frombuffer(keys, np.uint8)[np.repeat(kept, lengths)].tobytes()
        key_ends, numbers = np.cumsum(lengths[kept]), numbers[kept]
    arrays = {column: numbers[:, place] for place, column in enumerate(COLUMNS[:-2])}
    for kind in ("mask", "depth"):  # what is the image for want of another lies beside none
        its_own = arrays[f"{kind}_blocks"] != arrays["image_blocks"]
        arrays |= {name: arrays[name] * its_own for name in (f"{kind}_blocks", f"{kind}_sizes")}
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
