"""Tars of images: WebDataset's shards, or archives of class folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.datasets.description import DESCRIPTION
from data_pipelines.files import read_json
from data_pipelines.images.issues import shown
from data_pipelines.images.sample import KINDS, TEXT, TEXT_SUFFIX, map_name
from data_pipelines.packing.listing import Listing, ListingEntry, MapPlace, Membership, Skipped
from data_pipelines.packing.sources.base import Content, ListedSource, read_piece
from data_pipelines.packing.sources.splits import membership, memberships_of_folders, split_kind, splits_of_files
from data_pipelines.shards.scan import IMAGE_SUFFIXES, MEMBER_NAME, META_NAME, image_rank
from data_pipelines.shards.tar import Member, TarDamageError, Trailing, members, walk
from data_pipelines.wording import counted

_MAX_LABEL_BYTES = 32
_NOTHING = Member("", 0, 0)
_MAX_FIELDS = 10_000  # no sample has so many
_DIGITS = re.compile(r"[0-9]+")


class TarSource(ListedSource):
    """The images of tars, in the order in which they lie there.

    Shards of WebDataset: a sample is the image, `.cls` and `.json` under one key; keys are kept where they are letters,
    digits, `_` and `-`, and no other tar has them. A key ends at the first dot of a name, as in WebDataset; but where
    what follows numbers the images (scan.0000.jpg, scan.0001.jpg), or is different for nearly each of them, it is part
    of the name, and each of them is a sample: in all tars or in none, and said in `notes`. The names of the classes,
    and of masks' levels, are taken from a `dataset.json` beside the tars. Of a tar cut short, everything before the
    cut. Other members are left out, counted in `notes`.

    Archives of class folders: tars whose images all lie in folders, without `.cls`, and without `.json` of their names;
    the first tar with an image decides. What the folders mean, says `memberships_of_folders`.

    The split is told by the folders in an archive, else by the names of the tars, see `splits_of_files`. In shards of
    no such names it is told by the folders that samples lie in, if some are train's and some val's or test's.

    While a tar is listed, each of its keys takes some 500 bytes of memory.

    Args:
        tars: In order.
        root: A folder that they all lie below.
        spool_folder: See `Listing`.
        labels: Whether to take labels from members or folders.
        split_folders: See `memberships_of_folders`.
        group_pattern: See `Listing`.

    Raises:
        FileNotFoundError: No image in them.
        ValueError: A tar of labels among archives of class folders; folders of tars whose classes have other names.
    """

    kind = "tars"

    def __init__(
        self,
        tars: Sequence[Path],
        root: Path,
        spool_folder: Path,
        labels: bool = True,
        split_folders: bool = True,
        group_pattern: re.Pattern[str] | None = None,
    ) -> None:
        super().__init__(root, Listing(spool_folder, group_pattern))
        self._tars = tuple(tars)
        self._sizes = [tar.stat().st_size for tar in self._tars]
        self._names = [tar.relative_to(root).as_posix() for tar in self._tars]
        bases = Counter(tar.name for tar in self._tars)
        self.shards = {tar.name: file for file, tar in enumerate(self._tars) if bases[tar.name] == 1}
        for file, (tar, name) in enumerate(zip(self._tars, self._names, strict=True)):
            self.shards |= {name: file, str(tar): file, str(tar.resolve()): file}
        self._named_by_more = False  # whether keys go on behind the first dot
        if _are_archives(self._tars):
            self._list_archives(labels, split_folders)
        else:
            fields = self._list_shards(labels, split_folders)
            if fields.are_of_keys():
                self.listing.close()
                self.listing, self.skipped = Listing(spool_folder, group_pattern), []
                self.notes, self._named_by_more = [fields.note()], True
                self._list_shards(labels, split_folders)
        self.listing.finish()
        if not len(self.listing):
            raise FileNotFoundError(
                f"no image in {counted(len(self._tars), 'tar')}, the first of them {self._tars[0]} "
                f"({', '.join('.' + suffix for suffix in IMAGE_SUFFIXES)})"
            )

    def key_in_shard(self, number: int) -> tuple[int, str]:
        entry = self.listing.entry(number)
        member = entry.path[len(self._names[entry.file]) + 1 :]
        folder, slash, name = member.rpartition("/")
        stem, _, suffix = name.partition(".")
        if self._named_by_more and "." in suffix:
            stem = f"{stem}.{suffix.rpartition('.')[0]}"
        return entry.file, folder + slash + stem

    def files(self) -> Iterator[Path]:
        """See `Source`."""
        return iter(self._tars)

    def _content(self, number: int) -> Content:
        entry = self.listing.entry(number)
        tar = self._tars[entry.file]
        json = read_piece(tar, entry.json_offset, entry.json_size) if entry.json_size else None
        maps = tuple((one.suffix, read_piece(tar, one.offset, one.size)) for one in entry.maps)
        return Content(read_piece(tar, entry.offset, entry.size), json, maps)

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

    def _splits(self) -> list[str | None]:
        splits, notes = splits_of_files(self._names)
        self.notes += notes
        return splits

    def _list_archives(self, labels: bool, split_folders: bool) -> None:
        others: Counter[str] = Counter()
        for file, (name, split) in enumerate(zip(self._names, self._splits(), strict=True)):
            before = len(self.listing)
            for member in self._members(file):
                path = member.name.removeprefix("./")
                suffix = path.rpartition(".")[2].lower()
                if _is_litter(path):
                    continue
                if suffix in IMAGE_SUFFIXES:
                    entry = ListingEntry(f"{name}/{member.name}", member.size, file, member.offset)
                    folder = path.lstrip("/").rpartition("/")[0]
                    self.listing.add(entry, Membership(split, folder), path.rpartition(".")[0])
                elif suffix == "cls" and labels:
                    raise ValueError(
                        f"{name} holds labels ({path}), and the first tar with an image holds nothing but class "
                        "folders; pack tars of one kind at a time"
                    )
                else:
                    others[suffix] += 1
            self._note_empty(name, before)
        self._note_others(others)
        found = self.listing.memberships
        by_split: dict[str | None, list[int]] = {}
        for place, one in enumerate(found):
            by_split.setdefault(one.split, []).append(place)
        self.memberships = [*found]
        for split, places in by_split.items():  # of each archive, or of all where their names tell no split
            below, notes = memberships_of_folders([str(found[place].label) for place in places], labels, split_folders)
            self.notes += notes
            # What an archive of held-out images calls its train, extra or unlabeled is held out
            by_name = split if {one.split for one in below} <= {"train", None} else None
            for place, one in zip(places, below, strict=True):
                self.memberships[place] = membership(by_name or one.split or split, one.label, found[place].group)

    def _list_shards(self, labels: bool, split_folders: bool) -> _Fields:
        """List the samples; what only all tars tell together is returned."""
        fields = _Fields()
        others: Counter[str] = Counter()
        num_bad_labels = 0
        splits = self._splits()
        for file, (name, split) in enumerate(zip(self._names, splits, strict=True)):
            before = len(self.listing)
            samples: dict[str, _Sample] = {}
            for member in self._members(file):
                match = MEMBER_NAME.match(member.name)
                if match is None or META_NAME.search(member.name):
                    continue
                sample = samples.setdefault(match[1], _Sample())
                suffix = match[2].lower()
                name_of_field, _, kind = suffix.rpartition(".")
                if (named := map_name(suffix)) is not None:
                    sample.maps.setdefault((named.field, named.kind), (named.suffix, member))
                elif kind in IMAGE_SUFFIXES:
                    sample.images.append((suffix, member))
                elif kind == TEXT_SUFFIX:
                    sample.maps.setdefault((name_of_field, TEXT), (TEXT_SUFFIX, member))
                elif kind in ("cls", "json"):
                    (sample.labels if kind == "cls" else sample.jsons).setdefault(name_of_field, member)
                else:
                    others[suffix] += 1
            with self._tars[file].open("rb") as tar:
                for key, sample in samples.items():
                    if not sample.images:  # what is named as a map is the image where nothing else is
                        sample.images = [sample.maps.pop(one) for one in list(sample.maps) if one[1] != TEXT]
                    if not sample.images:
                        self.skipped.append(Skipped(f"{name}/{key}", "a key without an image"))
                        continue
                    fields.add(key, sample)
                    own = split
                    if split_folders and not any(splits):
                        own = next(filter(None, map(split_kind, key.split("/")[:-1])), None)
                    for one in sample.chosen(key, self._named_by_more, others):
                        label = None
                        if labels and one.label is not None:
                            size = min(one.label.size, _MAX_LABEL_BYTES)
                            label = _label(os.pread(tar.fileno(), size, one.label.offset))
                            num_bad_labels += label is None
                        image, json = one.image, one.json
                        entry = ListingEntry(
                            f"{name}/{image.name}", image.size, file, image.offset, json.offset, json.size, one.maps
                        )
                        self.listing.add(entry, Membership(own, label), one.key.removeprefix("./"))
            self._note_empty(name, before)
        self._note_others(others)
        if num_bad_labels:
            self.notes.append(f"{num_bad_labels:,} .cls members are no number of 0 or more; their images have no label")
        if labels:
            classes = self._stored("classes", "numbers", "--no-labels")
            self.classes = None if classes is None else tuple(classes)
        self.mask_names = self._stored("mask_names", "levels of masks", "--mask-names for all of them")
        stored = self.listing.memberships
        told = {one.split for one in stored}
        if any(splits) or ("train" in told and told & {"val", "test"}):
            self.memberships = [membership(*one) for one in stored]
        else:  # a folder called val is no split where there is no train
            self.memberships = [one._replace(split=None) for one in stored]
        return fields

    def _note_empty(self, name: str, before: int) -> None:
        if len(self.listing) == before:
            self.notes.append(f"{name} holds no image")

    def _note_others(self, others: Counter[str]) -> None:
        if others:
            told = ", ".join(f"{count:,} .{suffix}" for suffix, count in others.most_common(10))
            self.notes.append(
                f"members other than one image, its maps, .cls, .json and .txt a key are left out: {told}"
            )

    def _stored(self, fact: str, what: str, advice: str) -> Any:
        """What the `dataset.json` beside the tars call `what`, under `fact`, if all of them do."""
        found: list[tuple[Any, Path]] = []
        for folder in sorted({tar.parent for tar in self._tars}):
            stored = read_json(folder / DESCRIPTION)
            names = stored.get(fact) if isinstance(stored, dict) else None
            values = names.values() if isinstance(names, dict) else names if isinstance(names, list) else ()
            given = names if values and all(isinstance(name, str) for name in values) else None
            if given not in [names for names, _ in found]:
                found.append((given, folder))
        named = [folder for names, folder in found if names is not None]
        if len(named) > 1:
            raise ValueError(
                f"the same {what} are other classes in {named[0]} and {named[1]}, as their dataset.json say; pack them "
                f"one by one, or give {advice}"
            )
        return found[0][0] if len(found) == 1 else None


class _Chosen(NamedTuple):
    """One image with what belongs to it."""

    key: str
    image: Member
    label: Member | None
    json: Member
    maps: tuple[MapPlace, ...]


@dataclass(slots=True)
class _Sample:
    """The members of one key up to the first dot; fields are what stands between it and the suffix, mostly nothing."""

    images: list[tuple[str, Member]] = field(default_factory=list)  # by suffix, such as depth.png
    labels: dict[str, Member] = field(default_factory=dict)  # by field
    jsons: dict[str, Member] = field(default_factory=dict)
    maps: dict[tuple[str, str], tuple[str, Member]] = field(default_factory=dict)  # by field and kind

    def best(self) -> dict[str, tuple[str, Member]]:
        """The images of the highest `image_rank` by field, of each the first."""
        rank = max(image_rank(suffix) for suffix, _ in self.images)
        found: dict[str, tuple[str, Member]] = {}
        for suffix, member in self.images:
            if image_rank(suffix) == rank:
                found.setdefault(suffix.rpartition(".")[0], (suffix, member))
        return found

    def chosen(self, key: str, named_by_more: bool, others: Counter[str]) -> list[_Chosen]:
        """The samples that these are; `others` counts the suffixes of what is none of them."""
        best = self.best()
        if not named_by_more:
            best = dict([next(iter(best.items()))])
        used = {id(member) for _, member in best.values()}
        found = []
        for name, (_, image) in best.items():
            label = self.labels.get("", self.labels.get(name))  # a.b.c.cls is of a.b.c.jpg
            json = self.jsons.get("", self.jsons.get(name, _NOTHING))
            if named_by_more:
                label, json = self.labels.get(name, label), self.jsons.get(name, json)
            maps = self.maps_of(name, named_by_more)
            used |= {id(label), id(json), *(id(member) for _, member in maps)}
            places = tuple(MapPlace(suffix, member.offset, member.size) for suffix, member in maps)
            found.append(_Chosen(f"{key}.{name}" if named_by_more and name else key, image, label, json, places))
        others.update(suffix for suffix, member in (*self.images, *self.maps.values()) if id(member) not in used)
        others.update(
            f"{name}.{kind}" if name else kind
            for kind, members in (("cls", self.labels), ("json", self.jsons))
            for name, member in members.items()
            if id(member) not in used
        )
        return found

    def maps_of(self, name: str, named_by_more: bool) -> list[tuple[str, Member]]:
        """Those of the image of a field: of each kind the one of the key, or else of the field; keys that go on: of the
        field first."""
        fields = (name, "") if named_by_more else ("", name)
        found = (
            next((self.maps[one, kind] for one in fields if (one, kind) in self.maps), None) for kind in (*KINDS, TEXT)
        )
        return [one for one in found if one is not None]


class _Fields:
    """What stands between key and suffix where images share a key: whether it tells different images (scan.0000.jpg,
    scan.0001.jpg) or the fields of one sample (1.left.jpg, 1.right.jpg)."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._num_keys = 0
        self._example = ""

    def add(self, key: str, sample: _Sample) -> None:
        """Count what belongs to a key, if that is several images."""
        found = sample.best() if len(sample.images) > 1 else {}
        if len(found) > 1:
            self._num_keys += 1
            self._example = self._example or " and ".join(f"{key}.{suffix}" for suffix, _ in [*found.values()][:2])
            if len(self._names) <= _MAX_FIELDS:
                self._names |= found.keys()

    def are_of_keys(self) -> bool:
        """Whether they tell different images: they are numbers in one place of them, or more than there are keys."""
        numbered = {_DIGITS.sub("#", name) for name in self._names}
        return len(self._names) > min(self._num_keys, _MAX_FIELDS) or (len(numbered) == 1 and "#" in numbered.pop())

    def note(self) -> str:
        """What to say where they do."""
        return (
            f"images such as {shown(self._example)} are samples of their own, not views of one: what follows the first "
            "dot of their names numbers them, or is different for nearly each"
        )


def _are_archives(tars: Sequence[Path]) -> bool:
    """Whether in the first of them with an image all lie in folders, without labels and without a `.json` of any.

    What else lies beside them, such as a README, a licence or a list, says nothing of it.
    """
    for tar in tars:
        images: set[str] = set()
        jsons: set[str] = set()
        try:
            for member in members(tar):
                path = member.name.removeprefix("./")
                match = MEMBER_NAME.match(path)
                if _is_litter(path) or match is None:
                    continue
                key, suffix = match[1], match[2].rpartition(".")[2].lower()
                if suffix == "cls" or (suffix in IMAGE_SUFFIXES and "/" not in path):
                    return False
                if suffix in IMAGE_SUFFIXES:
                    images.add(key)
                elif suffix == "json":
                    jsons.add(key)
                if key in images and key in jsons:
                    return False
        except TarDamageError:
            pass  # what lies before the damage decides
        if images:
            return True
    return False


def _is_litter(path: str) -> bool:
    """What a computer's own programs leave in archives."""
    return META_NAME.search(path) is not None or path.rpartition("/")[2].startswith(".")


def _label(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 10 else None
