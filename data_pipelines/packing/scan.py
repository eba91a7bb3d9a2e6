"""Which images of a source are packed: in which split each, with which label."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.images.issues import shown
from data_pipelines.packing.listing import Skipped
from data_pipelines.packing.sources.base import Source
from data_pipelines.rng import Purpose, random_bits, stream_key
from data_pipelines.shards.index import NO_LABEL
from data_pipelines.wording import counted

_MAX_LABEL = 999_999
_FEW = 30  # labelled images in val, below which a probe says little
_ROUNDING = 1e-9  # images
_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass
class Catalogue:
    """What is packed of a source. The numbers are those of the source's listing."""

    source: Source
    splits: dict[str, np.ndarray]  # (n,) int64 by split, ascending
    labels: np.ndarray  # (entries of the listing,) int32, NO_LABEL where there is none
    classes: tuple[str, ...] | None  # their names; None where labels are only numbers, or there are none
    skipped: list[Skipped] = field(default_factory=list)  # known before any image is read
    num_left_out: int = 0
    groups: dict[str, int] | None = None  # how many of the groups that no two splits share are in each


def scan(
    source: Source,
    split: str = "train",
    val_share: float = 0.0,
    seed: int = 0,
    leave_out: Path | None = None,
) -> Catalogue:
    """Decide what of a source is packed as what.

    Where the source names splits, they are kept; other entries belong to `split`. `val_share` of every class is held
    back as `val`; where the source knows groups, whole ones, so that train and val share none; the frames of one file
    are a group where none is named. Labels that are text
    are numbered in the order of the names; those that are numbers stay what they
    are. Of entries with one path the first counts.

    Args:
        source: Listed.
        split: Name of the split of what has none of its own.
        val_share: Share of every class of `split` (or train) to hold back.
        seed: Of what is held back.
        leave_out: A file of JSON lines, each with the `path` of an image within the source, or its `key`; a tar's also
            with its `shard`.

    Raises:
        ValueError: A name that no split may have; `val_share` with a `val` that is there, or too small; no entry is
            named by `leave_out`, or all are; what is held back is of one class; a group in several splits.
    """
    listing, memberships = source.listing, source.memberships
    names = sorted({membership.split or split for membership in memberships})
    for name in names:
        if not _SPLIT.fullmatch(name):
            raise ValueError(f"a split is named {name!r}; its name must be of letters, digits, _ and -")
        within = [other for other in names if name.startswith(f"{other}-")]
        if within:
            raise ValueError(
                f"a split is named {name!r} and another {within[0]!r}: {within[0]}-*.tar names the shards of both; "
                f"call it {name.replace('-', '_')!r}"
            )
    numbers, classes = _number_labels(source)
    labels = numbers[listing.membership_numbers]
    kept = np.ones(len(listing), dtype=bool)
    kept[listing.repeats] = False
    skipped = [*source.skipped]
    skipped += [Skipped(listing.entry(int(place)).path, "listed more than once") for place in listing.repeats]
    num_left_out = 0
    if leave_out is not None:
        named = _find_named(source, leave_out)
        num_left_out = int(kept[named].sum())
        kept[named] = False
    if not kept.any():
        raise ValueError(f"{leave_out} names all {len(listing)} images; nothing would be packed")
    split_numbers = np.array([names.index(membership.split or split) for membership in memberships], dtype=np.int32)
    of_entries = split_numbers[listing.membership_numbers]
    splits = {name: np.flatnonzero(kept & (of_entries == number)) for number, name in enumerate(names)}
    splits = {name: found for name, found in splits.items() if len(found)}
    if val_share:
        if "val" in splits:
            raise ValueError(
                f"val_share is {val_share:g}, and there is a split val already ({', '.join(names)}); leave val_share "
                "at 0, or give the split another name"
            )
        taken_from = "train" if "train" in splits else split
        if taken_from not in splits:
            raise ValueError(
                f"val_share is {val_share:g}, to be taken from {taken_from}, and the images are of the splits "
                f"{', '.join(splits)}; leave val_share at 0"
            )
        group_names = sorted({one.group for one in memberships if one.group is not None})
        members = splits[taken_from]
        if group_names:
            groups = _groups_of(source, group_names)
            rest, held = _hold_back_groups(members, labels, groups, val_share, seed)
            advice = _advice_on_groups(labels[members], groups[members])
        else:
            rest, held = _hold_back(members, labels, val_share, seed)
            advice = _advice_on_images(labels[members])
        source.notes += _check_held(labels[members], labels[held], val_share, advice)
        splits |= {taken_from: rest, "val": held}
    return Catalogue(source, splits, labels, classes, skipped, num_left_out, _count_groups(source, splits))


def _groups_of(source: Source, names: list[str]) -> np.ndarray:
    """Of every entry the number of its group in `names`, or one of its own where it is in none: (n,) int64."""
    places = {name: place for place, name in enumerate(names)}
    of_memberships = np.array([-1 if one.group is None else places[one.group] for one in source.memberships])
    groups = of_memberships[source.listing.membership_numbers]
    alone = np.flatnonzero(groups < 0)
    groups[alone] = len(names) + np.arange(len(alone))
    return groups


def _count_groups(source: Source, splits: dict[str, np.ndarray]) -> dict[str, int] | None:
    """Groups by split, None where nobody named any; ValueError where splits share one."""
    names = sorted({one.group for one in source.memberships if one.group is not None})
    if not names or source.listing.groups_frames:  # the entries of one file are never in two splits
        return None
    groups = _groups_of(source, names)
    found = {split: np.unique(groups[members]) for split, members in splits.items()}
    numbers, times = np.unique(np.concatenate(list(found.values())), return_counts=True)
    shared = numbers[times > 1]
    if len(shared):
        first = ", ".join(shown(names[number]) for number in shared[:3].tolist())
        raise ValueError(
            f"{len(shared)} of {len(names)} groups have images in several of the splits {', '.join(splits)}, such as "
            f"{first}: what a probe learns of them in one it is tested on in the other. Correct the splits, or take "
            "them away and let --val-share make them by group"
        )
    return {split: len(members) for split, members in found.items()}


def _check_held(before: np.ndarray, held: np.ndarray, share: float, advice: str) -> list[str]:
    """What to say of the labels (n,) held back out of `before`; ValueError where a probe could tell nothing by them."""
    classes = np.unique(before[before != NO_LABEL])
    of_val = np.unique(held[held != NO_LABEL])
    if len(classes) < 2:
        return []
    if len(of_val) < 2:
        raise ValueError(
            f"val_share is {share:g}, which holds back {len(held):,} images of {len(of_val)} of {len(classes):,} "
            f"classes: a probe of one class is right whatever it says; {advice}"
        )
    notes = []
    if len(of_val) < len(classes):
        notes.append(f"val has images of {len(of_val):,} of {len(classes):,} classes; {advice}")
    num_labelled = int((held != NO_LABEL).sum())
    if num_labelled < _FEW:
        notes.append(
            f"val has {num_labelled} labelled images, so that one of them is {1 / num_labelled:.1%} of a probe's "
            "accuracy; a larger --val-share measures more finely"
        )
    return notes


def _advice_on_images(labels: np.ndarray) -> str:
    """Which share has an image of every class, of images with these labels (n,)."""
    counts = np.unique(labels[labels != NO_LABEL], return_counts=True)[1]
    enough = 1 / int(counts[counts > 1].min()) if (counts > 1).any() else 1.0
    return f"at --val-share {enough:.2g} there is one of each class that has two images"


def _advice_on_groups(labels: np.ndarray, groups: np.ndarray) -> str:
    """The same of whole groups: (n,) each."""
    numbers, own = np.unique(groups, return_inverse=True)
    classes, of_class = np.unique(labels, return_inverse=True)
    brought = np.zeros((len(numbers), len(classes)), dtype=np.int64)
    np.add.at(brought, (own, of_class), 1)
    kinds, of_kind = np.unique(brought, axis=0, return_inverse=True)  # few, however many groups are of one image
    least = np.array([_least_share(kind, brought.sum(axis=0)) for kind in kinds])[of_kind.reshape(-1)]
    several = [row for row, known in zip(brought.T, classes != NO_LABEL, strict=True) if known and (row > 0).sum() > 1]
    if not several:
        return "each class has images of one group only, and groups are not divided: a class needs two groups"
    enough = max(float(least[row > 0].min()) for row in several)
    return f"from --val-share {_rounded_up(enough):g} on there can be one group of each class that has two groups"


def _least_share(brought: np.ndarray, of_all: np.ndarray) -> float:
    """From which share on `_hold_back_groups` takes a group that brings (classes,) of the images (classes,)."""
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        if np.abs(share * of_all - brought).sum() <= share * of_all.sum():
            high = share
        else:
            low = share
    return high


def _rounded_up(share: float) -> float:
    """To two digits behind the point, so that what is advised is enough."""
    return math.ceil(round(share * 100, 6)) / 100


def _number_labels(source: Source) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """The label of every membership: (memberships,) int32; and the names of the classes."""
    given = [membership.label for membership in source.memberships]
    known = {label for label in given if label is not None}
    if not known:
        return np.full(len(given), NO_LABEL, dtype=np.int32), None
    if all(isinstance(label, int) for label in known):
        most = max(int(label) for label in known)
        if most > _MAX_LABEL:
            raise ValueError(
                f"{source.root} has the label {most}, and a number of a class is at most {_MAX_LABEL}; choose another "
                "column (--label-column), or pack without labels (--no-labels)"
            )
        if source.classes is not None and most >= len(source.classes):
            raise ValueError(
                f"{source.root} has the label {most}, and names {len(source.classes)} classes; pack without labels "
                "(--no-labels), or mend one of them"
            )
        return np.array([NO_LABEL if label is None else label for label in given], dtype=np.int32), source.classes
    numbers = [label for label in known if isinstance(label, int)]
    if numbers:
        raise ValueError(
            f"{source.root} has numbers as labels, such as {numbers[0]}, and text, such as "
            f"{min(label for label in known if isinstance(label, str))!r}; pack these files one by one, or without "
            "labels (--no-labels)"
        )
    classes = sorted(map(str, known))
    places = {name: place for place, name in enumerate(classes)}
    return (
        np.array([NO_LABEL if label is None else places[str(label)] for label in given], dtype=np.int32),
        tuple(classes),
    )


def _hold_back(members: np.ndarray, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the entries into those that stay and a share of every class; at least one of a class stays."""
    own = labels[members]
    by_class = own.argsort(kind="stable")
    held = np.zeros(len(members), dtype=bool)
    first = 0
    for label, count in zip(*np.unique(own, return_counts=True), strict=True):
        places = by_class[first : first + count]
        key = stream_key(seed, Purpose.HOLD_BACK, int(label) + 1)
        num_held = min(round(share * int(count)), int(count) - 1)
        held[places[random_bits(key, int(count)).argsort(kind="stable")[:num_held]]] = True
        first += count
    if not held.any():
        largest = int(np.unique(own, return_counts=True)[1].max())
        enough = f" {1 / largest:.2g} or" if largest > 1 else ""
        raise ValueError(
            f"val_share is {share:g}, which is not one image of any class: the largest has {largest:,}, of which one "
            f"stays; give{enough} 0 for no val, or pack without labels (--no-labels)"
        )
    return members[~held], members[held]


def _hold_back_groups(
    members: np.ndarray, labels: np.ndarray, groups: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `_hold_back`, but of whole groups: in an order by the seed, each that brings classes nearer to their share.

    One that brings them no nearer and no farther is taken for a class that has none held back yet.
    """
    classes, own = np.unique(labels[members], return_inverse=True)
    missing = share * np.bincount(own, minlength=len(classes))  # of val, by class
    of_members = groups[members]
    by_group = of_members.argsort(kind="stable")
    numbers, firsts, counts = np.unique(of_members[by_group], return_index=True, return_counts=True)
    held = np.zeros(len(members), dtype=bool)
    num_held, num_of_class = 0, np.zeros(len(classes), dtype=np.int64)
    order = random_bits(stream_key(seed, Purpose.HOLD_BACK, 0, 1), len(numbers)).argsort(kind="stable")
    for place in order.tolist():
        places = by_group[firsts[place] : firsts[place] + counts[place]]
        brought = np.bincount(own[places], minlength=len(classes))
        nearer = np.abs(missing).sum() - np.abs(missing - brought).sum()
        is_new = bool((brought[num_of_class == 0] > 0).any())
        if num_held + 1 < len(numbers) and (nearer > _ROUNDING or (is_new and nearer > -_ROUNDING)):
            missing = missing - brought
            num_of_class += brought
            held[places] = True
            num_held += 1
    if not num_held:
        told = f"val_share is {share:g}, and the images are of {counted(len(numbers), 'group')}: "
        if len(numbers) < 2:
            raise ValueError(
                f"{told}groups are not divided, so there must be two at least (frames of one file are a group, where "
                "none is named)"
            )
        of_all = np.bincount(own, minlength=len(classes))
        least = min(
            _least_share(np.bincount(own[by_group[first : first + count]], minlength=len(classes)), of_all)
            for first, count in zip(firsts, counts, strict=True)
        )
        raise ValueError(
            f"{told}none fits, and groups are not divided. Give --val-share {_rounded_up(least):g} or more"
        )
    return members[~held], members[held]


def _find_named(source: Source, file: Path) -> np.ndarray:
    """The entries that a list of what to leave out names, ascending."""
    paths: set[str] = set()
    keys: set[str] = set()
    keys_of_shards: set[tuple[int, str]] = set()
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            path, key, shard = _read_line(line, f"{file}, line {number}")
            if path is not None:
                paths.add(path)
            elif shard in source.shards or Path(shard).name in source.shards:
                keys_of_shards.add((source.shards.get(shard, source.shards.get(Path(shard).name, -1)), key))
            else:  # of shards that were packed from this source
                keys.add(key)
    found = []
    for number in range(len(source.listing)):
        if (
            (paths and source.listing.entry(number).path in paths)
            or (keys and source.listing.key(number) in keys)
            or (keys_of_shards and source.key_in_shard(number) in keys_of_shards)
        ):
            found.append(number)
    if not found and (paths or keys or keys_of_shards):
        raise ValueError(
            f"{file} names no image of {source.root}; the first image has the path {source.listing.entry(0).path!r} "
            f"and the key {source.listing.key(0)!r}"
        )
    return np.array(found, dtype=np.int64)


def _read_line(line: str, place: str) -> tuple[str | None, str, str]:
    """Path, key and shard; the key and the shard empty where the line has a path."""
    try:
        stored = json.loads(line)
        if isinstance(stored.get("path"), str):
            return stored["path"], "", ""
        if isinstance(stored["key"], str):
            return None, stored["key"], str(stored.get("shard") or "")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    raise ValueError(
        f'{place} is {line.strip()[:100]!r}; a line is JSON, such as {{"path": "cat/1.jpg"}} or {{"key": ...}}'
    )
