"""A folder of folders of frames: each becomes one sample of several images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.images.pixels import check_file_size
from data_pipelines.packing.listing import Listing, ListingEntry, Membership
from data_pipelines.packing.sources.base import Content, ListedSource, read_exactly
from data_pipelines.packing.sources.splits import memberships_of_folders
from data_pipelines.shards.scan import IMAGE_SUFFIXES

_DIGITS = re.compile(r"([0-9]+)")


class _Frame(NamedTuple):
    name: str
    size: int  # bytes


class StackFolders(ListedSource):
    """The folders below a root that hold images and no folder with images: a stack each, of all its images in the
    natural order of their names (2 before 10).

    What the folders above a stack mean, says `memberships_of_folders`: `train/CLASS/STACK/*`, `CLASS/STACK/*` or
    `STACK/*`. A `.json` of a stack's name beside it is its metadata. Names that begin with a dot or with `__` are
    passed over.

    Raises:
        FileNotFoundError: There is no folder of two images or more.
        ValueError: A folder holds images as well as folders of images.
    """

    kind = "stacks"

    def __init__(
        self,
        root: Path,
        spool_folder: Path,
        labels: bool = True,
        split_folders: bool = True,
        group_pattern: re.Pattern[str] | None = None,
    ) -> None:
        super().__init__(root, Listing(spool_folder, group_pattern))
        lengths: list[int] = []
        for path, frames in _walk(root, ""):
            if len(frames) < 2:
                self.notes.append(f"{path or root} holds one image, which is no stack, and is left out")
                continue
            sidecar = root / f"{path}.json"
            size = sum(frame.size for frame in frames)
            json_size = sidecar.stat().st_size if sidecar.is_file() else 0
            self.listing.add(
                ListingEntry(path, size, json_size=json_size), Membership(label=path.rpartition("/")[0]), key=path
            )
            self.listing.note("\0".join(f"{frame.name} {frame.size}" for frame in frames).encode(errors="replace"))
            lengths.append(len(frames))
        self.listing.finish()
        if not lengths:
            suffixes = ", ".join("." + suffix for suffix in IMAGE_SUFFIXES)
            raise FileNotFoundError(f"{root} has no folder of two images or more ({suffixes}), which would be a stack")
        self.notes.append(f"{len(lengths):,} stacks of {min(lengths):,} to {max(lengths):,} frames")
        stored = self.listing.memberships
        belongs, notes = memberships_of_folders([str(one.label) for one in stored], labels, split_folders)
        self.memberships = [one._replace(group=was.group) for one, was in zip(belongs, stored, strict=True)]
        self.notes += notes

    def _content(self, number: int) -> Content:
        entry = self.listing.entry(number)
        folder = self.root / entry.path
        frames = _frames_in(folder)
        size = sum(frame.size for frame in frames)
        if size != entry.size:
            raise OSError(
                f"{folder} had {entry.size} bytes of images and has {size} now; pack when nothing writes there"
            )
        check_file_size(size)
        json = read_exactly(self.root / f"{entry.path}.json", entry.json_size) if entry.json_size else None
        images = tuple(read_exactly(folder / frame.name, frame.size) for frame in frames)
        return Content(images[0], json, frames=images)

    def _files_of(self, entry: ListingEntry) -> list[Path]:
        beside = [self.root / f"{entry.path}.json"] if entry.json_size else []
        folder = self.root / entry.path
        return [*(folder / frame.name for frame in _frames_in(folder)), *beside]


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """What names are sorted by so that numbers in them count as numbers: f2.png before f10.png."""
    parts = _DIGITS.split(name)
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)], name


def _frames_in(folder: Path) -> list[_Frame]:
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith((".", "__")) and _is_image(entry)]
        frames = [_Frame(entry.name, entry.stat().st_size) for entry in found]
    return sorted(frames, key=lambda frame: natural(frame.name))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and entry.is_file()


def _walk(
    root: Path, below: str, ancestors: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, list[_Frame]]]:
    """The folders that hold images, in the order of their paths; links are followed, but not in circles."""
    folder = root / below
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        return
    with os.scandir(folder) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__")))
    frames, num_below = _frames_in(folder), 0
    for name in folders:
        for found in _walk(root, f"{below}/{name}" if below else name, ancestors | {here}):
            num_below += 1
            yield found
    if frames and num_below:
        raise ValueError(
            f"{folder} holds images as well as folders of images; a stack is a folder of images alone, so move either "
            "away, or pack them as single images (--from folder)"
        )
    if frames and below:
        yield below, frames
    elif frames:
        raise ValueError(f"{root} holds images itself; name the folder that holds a folder for each stack")
