"""What a folder of images holds: splits, classes, and a key for every image."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_pipelines.shard_index import IMAGE_SUFFIXES
from data_pipelines.streams import Purpose, random_bits, stream_key

#: Folder names that are splits when they, `train` among them, are all there is; and the splits' names.
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MAX_KEY_LENGTH = 80  # so that key and suffix fit into a ustar header
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(slots=True)
class Item:
    """One image file of the tree."""

    path: str  # below the root, with forward slashes
    size: int  # bytes
    label: int | None = None
    key: str = ""
    json_size: int | None = None  # bytes of the .json of the same name beside it


@dataclass
class Tree:
    """The images of every split, in the order of their paths, and the names of the classes."""

    root: Path
    splits: dict[str, list[Item]]
    classes: tuple[str, ...] | None

    @property
    def fingerprint(self) -> str:
        """A hash over paths and sizes: equal for equal trees wherever they lie, and however they are split."""
        digest = hashlib.sha256()
        items = [item for found in self.splits.values() for item in found]
        for item in sorted(items, key=lambda item: item.path):
            line = f"{item.path}\0{item.size}\0{item.json_size}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def scan(root: Path, split: str = "train", val_share: float = 0.0, seed: int = 0) -> Tree:
    """Find the images below `root`.

    If all images lie in folders named train, val (or valid, validation) and test, each is a split.
    Otherwise all belong to `split`, and `val_share` of every class is held back as `val`. Below that,
    the first-level folder is the class; images that lie in no folder have no label. Names that begin
    with a dot or with `__` are passed over.

    Raises:
        FileNotFoundError: No such folder, or no image in it.
        ValueError: Images lie both in and beside class folders; `val_share` with a tree that has its own splits.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name the folder of your images")
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share is {val_share:g}; it must be a share of the images, 0 <= val_share < 1")
    items = sorted(_walk(root), key=lambda item: item.path)
    if not items:
        raise FileNotFoundError(f"{root} holds no image ({', '.join('.' + suffix for suffix in IMAGE_SUFFIXES)})")
    folders = {item.path.partition("/")[0] if "/" in item.path else "" for item in items}
    if "train" in folders and folders <= SPLIT_FOLDERS.keys():
        if val_share:
            raise ValueError(
                f"val_share is {val_share:g}, and {root} has splits of its own: {', '.join(sorted(folders))}; "
                "leave val_share at 0"
            )
        splits: dict[str, list[Item]] = {}
        for folder in sorted(folders):
            name = SPLIT_FOLDERS[folder]
            if name in splits:
                raise ValueError(f"{root} has more than one folder for the split {name}; leave one of them")
            splits[name] = [item for item in items if item.path.startswith(folder + "/")]
        classes = _set_labels(root, splits, depth=1)
    else:
        splits = {split: items}
        classes = _set_labels(root, splits, depth=0)
        if val_share:
            if split == "val":
                raise ValueError("split is 'val' and val_share takes a split 'val' from it; give split another name")
            splits = _hold_back(splits[split], split, val_share, seed)
    for found in splits.values():
        _set_keys(found)
    return Tree(root, splits, classes)


def _walk(root: Path) -> Iterator[Item]:
    """All images below the root, in no order; links to folders are followed, but not in circles."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        below, ancestors = pending.pop()
        status = (root / below).stat()
        here = (status.st_dev, status.st_ino)
        if here in ancestors:
            continue
        with os.scandir(root / below) as entries:
            found = [entry for entry in entries if not entry.name.startswith((".", "__"))]
        sidecars = {entry.name: entry for entry in found if entry.name.endswith(".json")}
        for entry in found:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir():
                pending.append((path, ancestors | {here}))
            elif entry.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and entry.is_file():
                sidecar = sidecars.get(entry.name.rpartition(".")[0] + ".json")
                json_size = sidecar.stat().st_size if sidecar is not None and sidecar.is_file() else None
                yield Item(path, entry.stat().st_size, json_size=json_size)


def _set_labels(root: Path, splits: dict[str, list[Item]], depth: int) -> tuple[str, ...] | None:
    """Number the classes, the folders at `depth` of the paths, by name; None if there are no such folders."""
    items = [item for found in splits.values() for item in found]
    named = [item for item in items if item.path.count("/") > depth]
    if not named:
        return None
    if len(named) < len(items):
        loose = next(item.path for item in items if item.path.count("/") <= depth)
        raise ValueError(
            f"{len(items) - len(named)} images of {root} lie beside the class folders, the first of them {loose}; "
            "move them into a class folder, or out of the tree"
        )
    classes = sorted({item.path.split("/", depth + 1)[depth] for item in items})
    numbers = {name: number for number, name in enumerate(classes)}
    for item in items:
        item.label = numbers[item.path.split("/", depth + 1)[depth]]
    return tuple(classes)


def _hold_back(items: list[Item], split: str, share: float, seed: int) -> dict[str, list[Item]]:
    """Take a share of every class out into `val`; at least one image of a class stays."""
    held: set[str] = set()
    by_class: dict[int | None, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    for label, members in by_class.items():
        count = min(round(share * len(members)), len(members) - 1)
        key = stream_key(seed, Purpose.HOLD_BACK, 0 if label is None else label + 1)
        held.update(members[place].path for place in random_bits(key, len(members)).argsort(kind="stable")[:count])
    if not held:
        raise ValueError(
            f"val_share is {share:g}, which is not one image of any class; hold back more, or 0 for no val"
        )
    return {
        split: [item for item in items if item.path not in held],
        "val": [item for item in items if item.path in held],
    }


def _set_keys(items: list[Item]) -> None:
    """Give every image a key without dots and slashes, made of its path; equal ones get a hash of it appended.

    WebDataset ends a key at the first dot, so `a_0.5.jpg` and `a_0.7.jpg` would be one sample.
    """
    for item in items:
        key = _UNSAFE.sub("_", str(PurePosixPath(item.path).with_suffix("")).replace("/", "-"))
        item.key = key if len(key) <= _MAX_KEY_LENGTH else _hashed(key, item.path)
    counts = Counter(item.key for item in items)
    for item in items:
        if counts[item.key] > 1:
            item.key = _hashed(item.key, item.path)
    assert len({item.key for item in items}) == len(items), "two paths with one 64-bit hash"


def _hashed(key: str, path: str) -> str:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{key[: _MAX_KEY_LENGTH - 17]}-{digest}"
