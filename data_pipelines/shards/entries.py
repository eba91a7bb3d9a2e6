"""The samples of a shard while its headers are read: what the members of one key hold, and all in little memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.shards.index import NO_LABEL

NO_IMAGE = -1
#: Of an entry, as they are kept: places are a block and bytes.
COLUMNS = ("image_blocks", "image_sizes", "labels", "json_blocks", "json_sizes",
           "mask_blocks", "mask_sizes", "depth_blocks", "depth_sizes", "text_blocks", "text_sizes",
           "image_rank", "has_label")  # fmt: skip
_WIDTH = len(COLUMNS)
_NOWHERE = (0, 0)


@dataclass(slots=True)
class Entry:
    """What the members of one key hold; places are (block, bytes)."""

    key: str
    image: tuple[int, int] = (NO_IMAGE, 0)
    image_rank: int = 0  # see `image_rank`
    label: int = NO_LABEL
    has_label: bool = False
    json: tuple[int, int] = _NOWHERE
    mask: tuple[int, int] = _NOWHERE
    depth: tuple[int, int] = _NOWHERE
    text: tuple[int, int] = _NOWHERE
    frames_from: int | None = None  # where the headers of the first of its numbered images begin: what may be a stack
    image_field: str = ""  # what stands between the first dot of the image's name and its suffix
    labels: dict[str, int | None] = field(default_factory=dict)  # by such a field: a.b.c.cls is of a.b.c.jpg
    jsons: dict[str, tuple[int, int]] = field(default_factory=dict)
    masks: dict[str, tuple[int, int]] = field(default_factory=dict)
    depths: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def settle(self) -> bool:
        """Take what is of the image's own name, where the key has no such member; whether its label is none."""
        self.json = self.json if self.json[1] else self.jsons.get(self.image_field, _NOWHERE)
        self.mask = self.mask if self.mask[1] else self.masks.get(self.image_field, _NOWHERE)
        self.depth = self.depth if self.depth[1] else self.depths.get(self.image_field, _NOWHERE)
        self.text = self.text if self.text[1] else self.texts.get(self.image_field, _NOWHERE)
        if self.has_label or self.image_field not in self.labels:
            return False
        label = self.labels[self.image_field]
        self.label, self.has_label = NO_LABEL if label is None else label, True
        return label is None


_Places = dict[str, tuple[int, int]]
_Dotted = tuple[str, dict[str, int | None], _Places, _Places, _Places, _Places]


class Rows:
    """The entries found so far, some 100 bytes each: a shard may hold ten million."""

    def __init__(self) -> None:
        self.keys = bytearray()
        self.key_ends = array("q")
        self.hashes = array("q")
        self.numbers = array("q")  # `COLUMNS`
        self.dotted: dict[int, _Dotted] = {}  # of rows whose members have dotted names: their fields, to be settled

    def __len__(self) -> int:
        return len(self.hashes)

    def append(self, entry: Entry) -> None:
        self.keys += entry.key.encode("utf-8", "surrogateescape")
        self.key_ends.append(len(self.keys))
        self.hashes.append(hash(entry.key))
        self.numbers.extend(_numbers(entry))
        self._keep_fields(len(self) - 1, entry)

    def key(self, row: int) -> str:
        begin = self.key_ends[row - 1] if row else 0
        return self.keys[begin : self.key_ends[row]].decode("utf-8", "surrogateescape")

    def entry(self, row: int) -> Entry:
        block, size, label, *places, rank, has_label = self.numbers[_WIDTH * row : _WIDTH * (row + 1)]
        json, mask, depth, text = zip(places[::2], places[1::2], strict=True)
        plain = (self.key(row), (block, size), rank, label, bool(has_label), json, mask, depth, text, None)
        return Entry(*plain, *self.dotted.get(row, ("", {}, {}, {}, {}, {})))

    def put(self, row: int, entry: Entry) -> None:
        self.numbers[_WIDTH * row : _WIDTH * (row + 1)] = array("q", _numbers(entry))
        self._keep_fields(row, entry)

    def table(self) -> np.ndarray:
        """(rows, columns) int64, a view."""
        return np.frombuffer(self.numbers, np.int64).reshape(-1, _WIDTH)

    def _keep_fields(self, row: int, entry: Entry) -> None:
        fields = (entry.labels, entry.jsons, entry.masks, entry.depths, entry.texts)
        if entry.image_field or any(fields):
            self.dotted[row] = (entry.image_field, *fields)

    def repeats(self) -> list[tuple[int, int]]:
        """(row of the first, later row) for keys whose members do not lie together, in the order of the later."""
        hashes = np.frombuffer(self.hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        first: dict[str, int] = {}
        found = []
        for row in sorted({*order[1:][same].tolist(), *order[:-1][same].tolist()}):
            earlier = first.setdefault(self.key(row), row)
            if earlier != row:
                found.append((earlier, row))
        return found


def _numbers(entry: Entry) -> tuple[int, ...]:
    return (
        *entry.image,
        entry.label,
        *entry.json,
        *entry.mask,
        *entry.depth,
        *entry.text,
        entry.image_rank,
        entry.has_label,
    )
