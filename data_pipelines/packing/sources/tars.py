"""Tars of images: WebDataset's shards, or archives of class folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.files import read_json
from data_pipelines.packing.listing import Entry, Group, Listing, Skipped
from data_pipelines.packing.sources.base import Content, ListedSource, groups_of_folders, read_piece, splits_of_files
from data_pipelines.shards.scan import IMAGE_SUFFIXES, MEMBER_NAME, META_NAME, image_rank
from data_pipelines.shards.tar import Member, TarDamageError, Trailing, members, walk

_MAX_LABEL_BYTES = 32
_NOTHING = Member("", 0, 0)


class TarSource(ListedSource):
    """The images of tars, in the order in which they lie there.

    Shards of WebDataset: a sample is the image, `.cls` and `.json` under one key; keys are kept where they are letters,
    digits, `_` and `-`, and no other tar has them. The names of the classes are taken from a `dataset.json` beside the
    tars. Of a tar cut short, everything before the cut. Other members are left out, counted in `notes`.

    Archives of class folders: tars of nothing but images, all of them in folders; the first tar with an image decides.
    What the folders mean, says `groups_of_folders`; a folder that holds all the others is passed over.

    The split is told by the folders in an archive, else by the names of the tars, see `splits_of_files`.

    While a tar is listed, each of its keys takes some 500 bytes of memory.

    Args:
        tars: In order.
        root: A folder that they all lie below.
        spool_folder: See `Listing`.
        labels: Whether to take labels from members or folders.

    Raises:
        FileNotFoundError: No image in them.
        ValueError: A tar of labels among archives of class folders; folders of tars whose classes have other names.
    """

    kind = "tars"

    def __init__(self, tars: Sequence[Path], root: Path, spool_folder: Path, labels: bool = True) -> None:
        self.root, self._tars = root, tuple(tars)
        self._sizes = [tar.stat().st_size for tar in self._tars]
        self._names = [tar.relative_to(root).as_posix() for tar in self._tars]
        self.listing = Listing(spool_folder)
        bases = Counter(tar.name for tar in self._tars)
        self.shards = {tar.name: file for file, tar in enumerate(self._tars) if bases[tar.name] == 1}
        for file, (tar, name) in enumerate(zip(self._tars, self._names, strict=True)):
            self.shards |= {name: file, str(tar): file, str(tar.resolve()): file}
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self.classes: tuple[str, ...] | None = None
        if _are_archives(self._tars):
            self._list_archives(labels)
        else:
            self._list_shards(labels)
        self.listing.finish()
        if not len(self.listing):
            raise FileNotFoundError(
                f"{len(self._tars)} tar(s), the first of them {self._tars[0]}, hold no image "
                f"({', '.join('.' + suffix for suffix in IMAGE_SUFFIXES)})"
            )

    def key_in_shard(self, number: int) -> tuple[int, str]:
        entry = self.listing.entry(number)
        member = entry.path[len(self._names[entry.file]) + 1 :]
        folder, slash, name = member.rpartition("/")
        return entry.file, folder + slash + name.partition(".")[0]

    def _content(self, number: int) -> Content:
        entry = self.listing.entry(number)
        tar = self._tars[entry.file]
        json = read_piece(tar, entry.json_offset, entry.json_size) if entry.json_size else None
        return Content(read_piece(tar, entry.offset, entry.size), json)

    def _members(self, file: int) -> Iterator[Member]:
        try:
            with self._tars[file].open("rb") as opened:
                for item in walk(opened):
                    if isinstance(item, Member):
                        yield item
                    elif isinstance(item, Trailing):
                        what = "another tar" if item.is_tar else "something"
                        self.notes.append(f"{self._names[file]}: {what} behind its end marker is left out")
                    elif item.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                        reason = f"{item.kind}, whose bytes are not in the archive as they are"
                        self.skipped.append(Skipped(f"{self._names[file]}/{item.name}", reason))
        except TarDamageError as error:
            self.skipped.append(Skipped(self._names[file], f"{error}; what lies before that is used"))

    def _list_archives(self, labels: bool) -> None:
        others: Counter[str] = Counter()
        splits = splits_of_files(self._names)
        for file, (name, split) in enumerate(zip(self._names, splits, strict=True)):
            for member in self._members(file):
                path = member.name.removeprefix("./")
                suffix = path.rpartition(".")[2].lower()
                if _is_litter(path):
                    continue
                if suffix in IMAGE_SUFFIXES:
                    entry = Entry(f"{name}/{member.name}", member.size, file, member.offset)
                    folder = path.lstrip("/").rpartition("/")[0]
                    self.listing.add(entry, Group(split, folder), path.rpartition(".")[0])
                elif suffix == "cls" and labels:
                    raise ValueError(
                        f"{name} holds labels ({path}), and the first tar with an image holds nothing but class "
                        "folders; pack tars of one kind at a time"
                    )
                else:
                    others[suffix] += 1
        self._note_others(others)
        found = self.listing.groups
        folders: dict[str | None, list[str]] = {}
        for group in found:
            folders.setdefault(group.split, []).append(str(group.label))
        outer = min(map(_num_outer, folders.values()), default=0)
        inner = [str(group.label).split("/", outer)[-1] for group in found]
        groups = groups_of_folders(inner, labels)
        self.groups = [
            group._replace(split=group.split or stored.split) for group, stored in zip(groups, found, strict=True)
        ]

    def _list_shards(self, labels: bool) -> None:
        others: Counter[str] = Counter()
        num_bad_labels = 0
        splits = splits_of_files(self._names)
        for file, (name, split) in enumerate(zip(self._names, splits, strict=True)):
            samples: dict[str, _Sample] = {}
            for member in self._members(file):
                match = MEMBER_NAME.match(member.name)
                if match is None or META_NAME.search(member.name):
                    continue
                sample = samples.setdefault(match[1], _Sample())
                suffix = match[2].lower()
                if suffix == "cls":
                    sample.label = sample.label or member
                elif suffix == "json":
                    sample.json = member if sample.json is _NOTHING else sample.json
                elif suffix.rpartition(".")[2] in IMAGE_SUFFIXES and image_rank(suffix) > sample.rank:
                    if sample.image is not None:
                        others[sample.suffix] += 1
                    sample.image, sample.suffix, sample.rank = member, suffix, image_rank(suffix)
                else:
                    others[suffix] += 1
            with self._tars[file].open("rb") as tar:
                for key, sample in samples.items():
                    if sample.image is None:
                        self.skipped.append(Skipped(f"{name}/{key}", "a key without an image"))
                        continue
                    label = None
                    if labels and sample.label is not None:
                        size = min(sample.label.size, _MAX_LABEL_BYTES)
                        label = _label(os.pread(tar.fileno(), size, sample.label.offset))
                        num_bad_labels += label is None
                    image, json = sample.image, sample.json
                    entry = Entry(f"{name}/{image.name}", image.size, file, image.offset, json.offset, json.size)
                    self.listing.add(entry, Group(split, label), key.removeprefix("./"))
        self._note_others(others)
        if num_bad_labels:
            self.notes.append(f"{num_bad_labels:,} .cls members are no number of 0 or more; their images have no label")
        if labels:
            self.classes = self._stored_classes()
        self.groups = self.listing.groups

    def _note_others(self, others: Counter[str]) -> None:
        if others:
            told = ", ".join(f"{count:,} .{suffix}" for suffix, count in others.most_common(10))
            self.notes.append(f"members other than one image, .cls and .json a key are left out: {told}")

    def _stored_classes(self) -> tuple[str, ...] | None:
        """What the `dataset.json` beside the tars call the classes, if all of them do."""
        found: dict[tuple[str, ...] | None, Path] = {}
        for folder in sorted({tar.parent for tar in self._tars}):
            stored = read_json(folder / "dataset.json")
            names = stored.get("classes") if isinstance(stored, dict) else None
            is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
            found.setdefault(tuple(names) if is_list and names else None, folder)
        named = [folder for names, folder in found.items() if names is not None]
        if len(named) > 1:
            raise ValueError(
                f"the same numbers are other classes in {named[0]} and {named[1]}, as their dataset.json say; pack "
                "them one by one, or without labels (--no-labels)"
            )
        return next(iter(found)) if len(found) == 1 else None


@dataclass(slots=True)
class _Sample:
    image: Member | None = None
    suffix: str = ""  # of the image
    rank: int = -1  # see `image_rank`
    label: Member | None = None
    json: Member = _NOTHING


def _are_archives(tars: Sequence[Path]) -> bool:
    """Whether the first of them with any sample in it holds only images, all in folders."""
    for tar in tars:
        num_images = 0
        try:
            for member in members(tar):
                path = member.name.removeprefix("./")
                if _is_litter(path):
                    continue
                if "/" not in path or path.rpartition(".")[2].lower() not in IMAGE_SUFFIXES:
                    return False
                num_images += 1
        except TarDamageError:
            pass  # what lies before the damage decides
        if num_images:
            return True
    return False


def _is_litter(path: str) -> bool:
    """What a computer's own programs leave in archives."""
    return META_NAME.search(path) is not None or path.rpartition("/")[2].startswith(".")


def _num_outer(folders: Sequence[str]) -> int:
    """How many folders, one in the other, hold all of these."""
    parts = [folder.split("/") for folder in folders]
    most = min(map(len, parts)) - 1
    return next((depth for depth in range(most) if len({part[depth] for part in parts}) > 1), most)


def _label(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 10 else None
