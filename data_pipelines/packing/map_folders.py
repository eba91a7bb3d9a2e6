"""Maps that go into shards with their images: from beside them or from folders of their own, checked and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.images.issues import shown
from data_pipelines.images.maps import BadMapError, encode_map, read_map, resized_nearest, upright_size
from data_pipelines.images.sample import KINDS, SUFFIXES, TEXT, TEXT_SUFFIX
from data_pipelines.packing.listing import Listing, key_text
from data_pipelines.packing.reencode import REENCODED, Prepared
from data_pipelines.packing.sources.base import read_exactly

_MAX_NAMED = 10


class MapFolder:
    """A folder of maps of one kind, which lie in it as their images do in theirs: `a/b.jpg` has `a/b.png` (or, of
    depths, `a/b.npy`).

    Raises:
        FileNotFoundError: There is no such folder, or it has a map of no image.
    """

    def __init__(self, kind: str, root: Path, listing: Listing) -> None:
        self.kind, self.root = kind, Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root} is no folder; name the one that holds a {kind} for each image")
        self._endings = tuple(dict.fromkeys(suffix.rpartition(".")[2] for suffix in SUFFIXES[kind]))
        found = 0
        for number in range(len(listing)):
            path = listing.entry(number).path
            place = self._place(path)
            if place is not None:
                found += 1
                listing.note(f"{kind} {place.relative_to(self.root)} {place.stat().st_size}".encode(errors="replace"))
        if not found:
            first = listing.entry(0).path
            raise FileNotFoundError(
                f"{root} has a {kind} for none of the {len(listing):,} images; that of {shown(first)} would be "
                f"{shown(key_text(first))}.{' or .'.join(self._endings)}"
            )

    def read(self, path: str) -> tuple[str, bytes] | None:
        """What the map of an image is called in a shard, and its bytes; None where there is none."""
        place = self._place(path)
        if place is None:
            return None
        return f"{self.kind}{place.suffix.lower()}", read_exactly(place, place.stat().st_size)

    def _place(self, path: str) -> Path | None:
        names = (self.root / f"{key_text(path)}.{ending}" for ending in self._endings)
        return next((name for name in names if name.is_file()), None)


class Beside(NamedTuple):
    """The maps of one image, and its captions, as they go into its shard, and what is wrong with others, by kind."""

    maps: dict[str, tuple[str, bytes]]  # what it is called behind the key, and its bytes
    refused: dict[str, str]  # why it is left out


NOTHING_BESIDE = Beside({}, {})


def maps_of(
    path: str, image: bytes, prepared: Prepared, stored: Sequence[tuple[str, bytes]], folders: Iterable[MapFolder]
) -> Beside:
    """Check the maps of an image; where it was made smaller, they are too, pixel by pixel of the nearest.

    Args:
        path: Of the image in its source.
        image: The file.
        prepared: As it goes into the shard.
        stored: The maps that lie beside it in the source.
        folders: Others, which go before those.
    """
    found = {suffix.partition(".")[0]: (suffix, content) for suffix, content in stored}
    for folder in folders:
        if (there := folder.read(path)) is not None:
            found[folder.kind] = there
    if not found:
        return NOTHING_BESIDE
    kept, refused = {}, {}
    if (text := found.pop(TEXT_SUFFIX, None)) is not None:
        if (reason := _bad_text(text[1])) is None:
            kept[TEXT] = text
        else:
            refused[TEXT] = f"{shown(path)}: {reason}"
    size = upright_size(image) if found else None
    for kind, (suffix, content) in sorted(found.items()):
        try:
            values = read_map(kind, content, size, shown(path))
        except BadMapError as error:
            refused[kind] = str(error)
            continue
        if prepared.outcome == REENCODED and size != (prepared.height, prepared.width):
            content, ending = encode_map(resized_nearest(values, (prepared.height, prepared.width)))
            suffix = f"{kind}.{ending}"
        kept[kind] = (suffix, content)
    return Beside(kept, refused)


def _bad_text(content: bytes) -> str | None:
    """Why captions can't be used; None where they can."""
    try:
        return None if content.decode("utf-8").strip() else "its .txt is empty"
    except UnicodeDecodeError as error:
        return f"its .txt is no UTF-8 ({error.reason} at byte {error.start})"


_COUNTED = (*KINDS, TEXT)


class MapCount:
    """How many images of a shard, or of all, have maps and captions."""

    def __init__(self) -> None:
        self._there = dict.fromkeys(_COUNTED, 0)
        self._refused: dict[str, list[str]] = {kind: [] for kind in _COUNTED}
        self._num_refused = dict.fromkeys(_COUNTED, 0)
        self._missing: dict[str, list[str]] = {kind: [] for kind in _COUNTED}
        self._num_images = 0

    def add(self, path: str, beside: Beside) -> None:
        """Count an image in."""
        self._num_images += 1
        for kind in _COUNTED:
            if kind in beside.maps:
                self._there[kind] += 1
            elif kind in beside.refused:
                self._num_refused[kind] += 1
                self._refused[kind] = [*self._refused[kind], beside.refused[kind]][:_MAX_NAMED]
            else:
                self._missing[kind] = [*self._missing[kind], shown(path)][:_MAX_NAMED]

    def add_receipt(self, receipt: Mapping[str, Any], num_images: int) -> None:
        """Count in what `as_json` gave of a shard."""
        self._num_images += num_images
        for kind in _COUNTED:
            one = receipt.get(kind, {"samples": 0, "refused": 0, "refusals": [], "missing": []})
            self._there[kind] += one["samples"]
            self._num_refused[kind] += one["refused"]
            self._refused[kind] = [*self._refused[kind], *one["refusals"]][:_MAX_NAMED]
            self._missing[kind] = [*self._missing[kind], *one["missing"]][:_MAX_NAMED]

    def as_json(self) -> dict[str, Any]:
        """By kind: `samples` that have one, how many were `refused` and the first `refusals`, how many images have
        none (`num_missing`) and the first of those. Kinds of which there is nothing are left out."""
        return {
            kind: {
                "samples": self._there[kind],
                "refused": self._num_refused[kind],
                "refusals": self._refused[kind],
                "num_missing": self._num_images - self._there[kind] - self._num_refused[kind],
                "missing": self._missing[kind],
            }
            for kind in _COUNTED
            if self._there[kind] or self._num_refused[kind]
        }


def told(maps: Mapping[str, Any]) -> list[str]:
    """Lines for people about what `MapCount.as_json` gave."""
    lines = []
    for kind, one in maps.items():
        lines.append(f"{kind}s: of {one['samples']:,} images")
        if one["refused"]:
            lines.append(f"{one['refused']:,} {kind}s are left out, such as: {'; '.join(one['refusals'][:3])}")
        if one["num_missing"]:
            named = f" ({', '.join(one['missing'][:_MAX_NAMED])})" if one["missing"] else ""
            lines.append(f"{one['num_missing']:,} images have no {kind}{named}")
    return lines
