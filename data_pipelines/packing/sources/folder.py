"""A folder of image files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.images.dicom import SUFFIXES as DICOM_SUFFIXES
from data_pipelines.images.sample import SUFFIXES, TEXT_SUFFIX
from data_pipelines.packing.listing import Listing, ListingEntry, MapPlace, Membership, Skipped, key_text
from data_pipelines.packing.sources.base import Content, ListedSource, read_exactly
from data_pipelines.packing.sources.dicom_files import DicomFiles, group_of, path_of
from data_pipelines.packing.sources.splits import memberships_of_folders
from data_pipelines.shards.scan import IMAGE_SUFFIXES

_NO_IMAGES = ("json", "csv", "tsv")  # metadata and lists, which nobody takes for images
_MAX_SUFFIXES = 10
_SUFFIXES = ", ".join("." + suffix for suffix in IMAGE_SUFFIXES)


class _Other(NamedTuple):
    """A file whose suffix is none of an image's."""

    path: str
    suffix: str
    json_size: int  # of what is beside it; 0: nothing


class FolderSource(ListedSource):
    """The images below a folder, in the order of their paths.

    What its folders mean, says `memberships_of_folders`. Names that begin with a dot or with `__` are passed over. A
    `.json` of an image's name beside it is its metadata, of a DICOM file that of each frame; a DICOM without a suffix
    of its own, such as IM000001, has its whole name before it. A `.mask.png`, `.depth.png` or `.depth.npy` is a map of
    the image of that name, see `images.maps`; a `.txt` has its captions. Files of other suffixes are counted
    in `notes`: they may be images of a kind that is not read.

    Raises:
        FileNotFoundError: No image in it.
        ValueError: Images lie both in and beside class folders.
    """

    kind = "folder"

    def __init__(
        self,
        root: Path,
        spool_folder: Path,
        labels: bool = True,
        split_folders: bool = True,
        group_pattern: re.Pattern[str] | None = None,
        dicom_window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(root, Listing(spool_folder, group_pattern))
        self._dicom = DicomFiles(dicom_window)
        num_arrays = 0
        others: Counter[str] = Counter()
        for found in _walk(root):
            if found is None:
                num_arrays += 1
            elif isinstance(found, _Other):
                entries = self._dicom.entries(root / found.path, found.path)
                if entries is None:
                    others[found.suffix] += 1
                elif isinstance(entries, Skipped):
                    self.skipped.append(entries)
                else:
                    group = group_of(entries)
                    self.listing.groups_frames |= group is not None
                    for entry in entries:
                        entry = entry._replace(json_size=found.json_size)
                        self.listing.add(entry, Membership(label=found.path.rpartition("/")[0], group=group))
            elif isinstance(found, Skipped):
                self.skipped.append(found)
            else:
                self.listing.add(found, Membership(label=found.path.rpartition("/")[0]))
        self.notes += self._dicom.notes()
        if num_arrays:
            self.notes.append(f"{num_arrays:,} .npy files beside an image of the same name are left out")
        if others:
            self.notes.append(f"left out, as images are told by their suffix ({_SUFFIXES}): {_told(others)}")
        self.listing.finish()
        if not len(self.listing):
            also = f", but {_told(others)}" if others else ""
            links = f"; {self.skipped[0].path} is {self.skipped[0].reason}" if self.skipped else ""
            raise FileNotFoundError(f"{root} holds no image ({_SUFFIXES}){also}{links}")
        stored = self.listing.memberships
        belongs, notes = memberships_of_folders([str(one.label) for one in stored], labels, split_folders)
        self.memberships = [one._replace(group=was.group) for one, was in zip(belongs, stored, strict=True)]
        self.notes += notes

    def _content(self, number: int) -> Content:
        entry = self.listing.entry(number)
        image = self._dicom.content(self.root, entry)
        json = read_exactly(self.root / _sidecar(path_of(entry)), entry.json_size) if entry.json_size else None
        maps = tuple((one.suffix, read_exactly(self.root / _map_path(entry, one), one.size)) for one in entry.maps)
        return Content(read_exactly(self.root / entry.path, entry.size) if image is None else image, json, maps)

    def _files_of(self, entry: ListingEntry) -> list[Path]:
        path = path_of(entry)
        beside = [_sidecar(path)] if entry.json_size else []
        return [self.root / name for name in (path, *beside, *(_map_path(entry, one) for one in entry.maps))]


def _map_path(entry: ListingEntry, one: MapPlace) -> str:
    return f"{key_text(entry.path)}.{one.suffix}"


def _sidecar(path: str) -> str:
    """The name of the metadata of an image."""
    stem, _, suffix = path.rpartition(".")
    return (stem if suffix.lower() in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES) else path) + ".json"


def _told(others: Counter[str]) -> str:
    """How many files of which suffixes, the most frequent first."""
    told = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others.most_common(_MAX_SUFFIXES)]
    rest = others.total() - sum(count for _, count in others.most_common(_MAX_SUFFIXES))
    return ", ".join(told + ([f"{rest:,} of other suffixes"] if rest else []))


def _walk(
    root: Path, below: str = "", ancestors: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[ListingEntry | Skipped | _Other | None]:
    """All images below the root in the order of their paths.

    Between them come None for an array that belongs to one, a link to nothing as skipped, and of every other file the
    suffix. Links to folders are followed, but not in circles.
    """
    status = (root / below).stat()
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        return
    with os.scandir(root / below) as entries:
        found = [(entry.name, entry.is_dir(), entry) for entry in entries if not entry.name.startswith((".", "__"))]
    names = {name for name, is_folder, entry in found if not is_folder and name.endswith(".json") and entry.is_file()}
    stems = {key_text(name) for name, is_folder, _ in found if not is_folder and _is_image(name, but=("npy",))}
    files = {name: entry for name, is_folder, entry in found if not is_folder and entry.is_file()}
    maps = _maps_in(files)
    of_others = {f"{stem}.{one.suffix}" for stem, places in maps.items() for one in places}
    # as whole paths compare: a folder's name goes on with a slash
    for name, is_folder, entry in sorted(found, key=lambda item: item[0] + "/" if item[1] else item[0]):
        path = f"{below}/{name}" if below else name
        sidecar = _sidecar(name)
        json_size = (root / below / sidecar).stat().st_size if sidecar in names else 0
        if is_folder:
            yield from _walk(root, path, ancestors | {here})
        elif name in of_others:
            continue
        elif not _is_image(name, but=()):
            suffix = Path(name).suffix.lower()
            if suffix[1:] not in _NO_IMAGES and entry.is_file():
                yield _Other(path, suffix, json_size)
        elif entry.is_file():
            if name.lower().endswith(".npy") and key_text(name) in stems:
                yield None
                continue
            yield ListingEntry(path, entry.stat().st_size, json_size=json_size, maps=maps.get(key_text(name), ()))
        elif entry.is_symlink():
            yield Skipped(path, "a link to nothing")


def _maps_in(files: dict[str, os.DirEntry[str]]) -> dict[str, tuple[MapPlace, ...]]:
    """Maps and captions of the images of a folder that have any, by the name without its suffix."""
    endings = [f".{suffix}" for suffixes in SUFFIXES.values() for suffix in suffixes]
    if not any(name.endswith((*endings, f".{TEXT_SUFFIX}")) for name in files):
        return {}
    found = {}
    for stem in {key_text(name) for name in files if _is_image(name, but=()) and not name.endswith(tuple(endings))}:
        named = [[one for one in each if f"{stem}.{one}" in files] for each in (*SUFFIXES.values(), (TEXT_SUFFIX,))]
        places = [MapPlace(one[0], 0, files[f"{stem}.{one[0]}"].stat().st_size) for one in named if one]
        if places:
            found[stem] = tuple(places)
    return found


def _is_image(name: str, but: tuple[str, ...]) -> bool:
    suffix = name.rpartition(".")[2].lower()
    return suffix in IMAGE_SUFFIXES and suffix not in but
