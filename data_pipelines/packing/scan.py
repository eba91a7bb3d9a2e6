"""Which images of a source are packed: in which split each, with which label."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.images.issues import shown
from data_pipelines.packing.held_back import (
    advice_on_groups,
    advice_on_images,
    check_held,
    hold_back,
    hold_back_groups,
)
from data_pipelines.packing.listing import Skipped
from data_pipelines.packing.sources.base import Source
from data_pipelines.shards.index import NO_LABEL

_MAX_LABEL = 999_999
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
                "at 0, for those are held back as they are; or call that split something else where the images lie"
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
            rest, held = hold_back_groups(members, labels, groups, val_share, seed)
            advice = advice_on_groups(labels[members], groups[members])
        else:
            rest, held = hold_back(members, labels, val_share, seed)
            advice = advice_on_images(labels[members])
        source.notes += check_held(labels[members], labels[held], val_share, advice)
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
