"""Tables with the images in them: parquet files, and the arrow files that Hugging Face's `save_to_disk` writes."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.packing.listing import Listing, ListingEntry, Skipped, key_text
from data_pipelines.packing.sources.base import ANY_COLUMNS, Columns, Content
from data_pipelines.packing.sources.cells import (
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    find_column,
    fractions_note,
    group_text,
    label_of_cell,
    look_at_labels,
    split_of_cell,
    unlabelled_note,
    usual_columns,
)
from data_pipelines.packing.sources.splits import membership, splits_of_files
from data_pipelines.packing.sources.table_files import TableFile, features_of, is_binary, open_table, plain
from data_pipelines.rng import Purpose, random_bits, stream_key
from data_pipelines.wording import counted

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content")
_WINDOW_BYTES = 64 << 20  # of images that a worker holds at a time


class Layout(NamedTuple):
    """Which column is what."""

    image: str
    in_struct: bool  # its bytes are a field of it
    path: str | None  # "image.path", where there is that field
    label: str | None
    split: str | None
    group: str | None
    mask: str | None
    metadata: tuple[str, ...]
    left_out: tuple[str, ...]  # columns of bytes

    def names(self) -> set[str]:
        """All columns that are read."""
        return {self.image, *self.metadata} | {name for name in (self.label, self.mask) if name is not None}


class TableSource:
    """The images of tables, row after row: parquet files, or arrow files.

    The image is a column of bytes, or a struct with `bytes` and perhaps `path`, from which the key is made. The label
    is text or a number, see `label_of_cell`, whose name Hugging Face's `ClassLabel` tells. Other columns but those of
    bytes become the json, and one of bytes may hold masks. Splits are told by a column `split` of text, see
    `split_of_cell`, else by the files' names or folders, see `splits_of_files`.

    Rows lie in row groups, which are read as a whole or, if they are large, from their beginning. So the row groups are
    shuffled, and the rows within windows of 64 MB of them.

    Args:
        files: In order, of one kind.
        root: A folder that they all lie below.
        kind: "parquet" or "arrow".
        spool_folder: See `Listing`.
        columns: Of image and label.
        labels: Whether to take labels.

    Raises:
        FileNotFoundError: No row in them.
        ValueError: No column of images, or none by the name that was given; it names those there are.
    """

    def __init__(
        self,
        files: Sequence[Path],
        root: Path,
        kind: str,
        spool_folder: Path,
        columns: Columns = ANY_COLUMNS,
        labels: bool = True,
    ) -> None:
        self.kind, self.root, self._files = kind, root, tuple(files)
        self.listing = Listing(spool_folder)
        self.shards: dict[str, int] = {}
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self.mask_names: dict[str, str] | None = None
        with open_table(self._files[0]) as table:
            self._layout = find_layout(table.schema, self._files[0], columns, labels)
            label = self._layout.label
            if label is not None and (fraction := self._fraction_in(label)) is not None:
                self.notes.append(fractions_note(self._files[0], label, fraction, columns.label is not None))
                labels = False
                self._layout = find_layout(table.schema, self._files[0], columns, labels)
            self.classes = _class_names(table.schema, self._layout.label)
        self.listing.group_key = self._layout.group or self.listing.group_key
        unused = usual_columns(self._layout.metadata, LABEL_COLUMNS)
        if labels and self._layout.label is None and unused:
            self.notes.append(f"column {unused[0]} is neither text nor whole numbers: no label, but in the json")
        untold = usual_columns(self._layout.metadata, SPLIT_COLUMNS)
        if untold and self._layout.split is None:
            self.notes.append(f"column {untold[0]} is no text and tells no split, but is in the json")
        if self._layout.left_out:
            self.notes.append(f"columns of bytes beside the image are left out: {', '.join(self._layout.left_out)}")
        names = [file.relative_to(root).as_posix() for file in self._files]
        units: list[tuple[int, int, int, int]] = []  # file, row group, rows, bytes of the images
        self._sizes = []
        self._num_unlabelled = self._num_moved = 0
        splits, notes = splits_of_files(names)
        self.notes += notes
        for number, (file, split) in enumerate(zip(self._files, splits, strict=True)):
            self._sizes.append(file.stat().st_size)
            with open_table(file) as table:
                self._check(table, file)
                self.listing.note(table.fingerprint())
                first = len(self.listing)
                for group in range(table.num_groups):
                    rows, num_bytes = table.group_size(group, self._layout.image)
                    self._list(table, group, names[number], len(self.listing) - first, split)
                    units.append((number, group, rows, num_bytes))
        if self._layout.label is not None and self._num_unlabelled:
            self.notes.append(unlabelled_note(self._num_unlabelled, self._layout.label))
        if self._num_moved:
            self.notes.append(
                f"{self._num_moved:,} images are of another split by column {self._layout.split} than by the name of "
                "their file, and the column counts"
            )
        self.listing.finish()
        if not len(self.listing):
            read = counted(len(self._files), f"{kind} file")
            raise FileNotFoundError(f"no row in {read}, the first of them {self._files[0]}")
        self._units = np.array(units, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._units[:, 2])])
        self._windows = np.zeros(len(self.listing), dtype=np.int32)
        self.memberships = self.listing.memberships

    def windows(self, seed: int) -> np.ndarray:
        """See `Source`. Row groups of more than a window's bytes fill several, one after the other."""
        window, filled = 0, 0
        key = stream_key(seed, Purpose.SHUFFLE, len(self._units))
        for unit in random_bits(key, len(self._units)).argsort(kind="stable"):
            rows, num_bytes = self._units[unit, 2:].tolist()
            pieces = max(1, min(rows, -(-num_bytes // _WINDOW_BYTES)))
            if filled and (pieces > 1 or filled + num_bytes > _WINDOW_BYTES):
                window, filled = window + 1, 0
            own = slice(self._starts[unit], self._starts[unit + 1])
            self._windows[own] = window + np.arange(rows) * pieces // max(1, rows)
            window, filled = (window + pieces, 0) if pieces > 1 else (window, filled + num_bytes)
        return self._windows

    def contents(self, numbers: Sequence[int]) -> Iterator[Callable[[], Content]]:
        """See `Source`; the numbers come window by window."""
        tables = _OpenTables(self._files, self._sizes)
        try:
            for _, run in groupby(numbers, key=lambda number: self._windows[number]):
                window = list(run)
                rows = self._read(tables, window)
                for number in window:
                    yield partial(self._content, *rows[number])
        finally:
            tables.close()

    def key_in_shard(self, number: int) -> tuple[int, str]:
        raise AssertionError("asked for the shard of a row of a table")

    def files(self) -> Iterator[Path]:
        """See `Source`."""
        return iter(self._files)

    def close(self) -> None:
        self.listing.close()

    def _fraction_in(self, column: str) -> str | None:
        """A number with a fraction in a column of any of the files."""
        for file in self._files:
            with open_table(file) as table:
                if column not in table.schema.names or not pa.types.is_floating(table.schema.field(column).type):
                    continue
                for group in range(table.num_groups):
                    rows, _ = table.group_size(group, self._layout.image)
                    for batch in table.read(group, [column], 0, rows) if rows else ():
                        _, fraction = look_at_labels(batch.column(column).to_pylist(), typed=True)
                        if fraction is not None:
                            return fraction
        return None

    def _check(self, table: TableFile, file: Path) -> None:
        missing = self._layout.names() - set(table.schema.names)
        if missing:
            raise ValueError(
                f"{file} has no column {', '.join(sorted(missing))}, which {self._files[0]} has; it has "
                f"{', '.join(table.schema.names)}. Pack files with the same columns together"
            )
        image = self._layout.image
        if self._layout.in_struct != pa.types.is_struct(table.schema.field(image).type):
            raise ValueError(f"{file}: column {image!r} is of another type than in {self._files[0]}")
        names = _class_names(table.schema, self._layout.label)
        if names != self.classes:
            raise ValueError(f"{file} names other classes than {self._files[0]}; pack them one by one")

    def _list(self, table: TableFile, group: int, name: str, first: int, split: str | None) -> None:
        """Append the rows of a row group, the first of which is the file's row `first`; no image is read."""
        layout = self._layout
        rows, num_bytes = table.group_size(group, layout.image)
        columns = [column for column in (layout.label, layout.path, layout.split, layout.group) if column is not None]
        columns = list(dict.fromkeys(columns))
        batches = list(table.read(group, columns, 0, rows)) if columns and rows else []
        labels: list = [None] * rows
        paths: list = [None] * rows
        own: list[str | None] = [split] * rows
        groups: list = [None] * rows
        if layout.label is not None:
            labels = [label for batch in batches for label in batch.column(layout.label).to_pylist()]
        if layout.path is not None:
            column, _, field = layout.path.partition(".")
            paths = [path for batch in batches for path in batch.column(column).field(field).to_pylist()]
        if layout.split is not None:
            own = [split_of_cell(value, split) for batch in batches for value in batch.column(layout.split).to_pylist()]
            self._num_moved += sum(one != split for one in own) if split is not None else 0
        if layout.group is not None:
            groups = [
                group_text(value, layout.group, f"a row of {name}")
                for batch in batches
                for value in batch.column(layout.group).to_pylist()
            ]
        for row, (label, path, kind, group_of_row) in enumerate(zip(labels, paths, own, groups, strict=True), first):
            key = key_text(path) if path else f"{key_text(name)}-{row:09d}"
            known = label_of_cell(label, False, f"{name}: the label of row {row}")
            self._num_unlabelled += known is None
            entry = ListingEntry(f"{name}/{row}", num_bytes // rows)
            self.listing.add(entry, membership(kind, known, group_of_row), key)

    def _read(self, tables: _OpenTables, numbers: Sequence[int]) -> dict[int, tuple[pa.RecordBatch, int]]:
        """Of every entry the batch and the row in it."""
        found: dict[int, tuple[pa.RecordBatch, int]] = {}
        ordered = np.sort(np.asarray(numbers))
        units = np.searchsorted(self._starts, ordered, side="right") - 1
        columns = sorted(self._layout.names() - {self._layout.label})
        for unit in np.unique(units):
            wanted = ordered[units == unit] - self._starts[unit]
            first, last = int(wanted[0]), int(wanted[-1]) + 1
            file, group = self._units[unit, :2].tolist()
            batches = list(tables.get(file).read(group, columns, first, last))
            ends = list(accumulate(batch.num_rows for batch in batches))
            for row in wanted.tolist():
                place = bisect_right(ends, row - first)
                batch = batches[place]
                found[int(self._starts[unit]) + row] = (batch, row - first - (ends[place] - batch.num_rows))
        return found

    def _content(self, batch: pa.RecordBatch, row: int) -> Content:
        content = _bytes_of(batch, self._layout.image, row)
        mask = None if self._layout.mask is None else _bytes_of(batch, self._layout.mask, row)
        metadata = {name: plain(batch.column(name)[row].as_py()) for name in self._layout.metadata}
        maps = (("mask.png", mask),) if mask else ()
        return Content(content or b"", json.dumps(metadata).encode() if metadata else None, maps)


def _bytes_of(batch: pa.RecordBatch, column: str, row: int) -> bytes | None:
    value = batch.column(column)[row].as_py()
    found: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    return found


class _OpenTables:
    """A few open files, for one thread."""

    def __init__(self, files: Sequence[Path], sizes: Sequence[int], most: int = 16) -> None:
        self._files, self._sizes, self._most = files, sizes, most
        self._open: dict[int, TableFile] = {}

    def get(self, number: int) -> TableFile:
        table = self._open.pop(number, None)
        if table is None:
            size = self._files[number].stat().st_size
            if size != self._sizes[number]:
                raise OSError(
                    f"{self._files[number]} had {self._sizes[number]} bytes and has {size} now; pack when nothing "
                    "writes to it"
                )
            table = open_table(self._files[number])
        self._open[number] = table  # the last used is the last in order
        if len(self._open) > self._most:
            self._open.pop(next(iter(self._open))).close()
        return table

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def find_layout(schema: pa.Schema, file: Path, columns: Columns, labels: bool) -> Layout:
    """Which column is what; see `TableSource`."""
    mask = None
    if columns.mask is not None:
        mask = find_column(schema.names, columns.mask, (), file, "masks", "--mask-column")
        if not _holds_images(schema.field(mask).type):
            raise ValueError(
                f"{file}: column {mask!r} is of type {schema.field(mask).type}; masks are bytes, as images"
            )
    candidates = [name for name in schema.names if name != mask and _holds_images(schema.field(name).type)]
    image = find_column(candidates or schema.names, columns.image, _only(candidates), file, "images", "--image-column")
    kind = schema.field(image).type
    if image not in candidates:
        raise ValueError(f"{file}: column {image!r} is of type {kind}; images are bytes, or a struct with bytes")
    fields = [kind.field(place) for place in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    has_path = any(field.name == "path" and _is_text(field.type) for field in fields)
    label = _find_label(schema, file, columns.label) if labels else None
    split = next(
        (name for name in usual_columns(schema.names, SPLIT_COLUMNS) if _is_text(schema.field(name).type)), None
    )
    group = None
    if columns.group is not None:
        group = find_column(schema.names, columns.group, (), file, "groups", "--group-column")
    others = [name for name in schema.names if name not in (image, label, mask)]
    left_out = tuple(name for name in others if _holds_images(schema.field(name).type))
    return Layout(
        image=image,
        in_struct=bool(fields),
        path=f"{image}.path" if has_path else None,
        label=label,
        split=split,
        group=group,
        mask=mask,
        metadata=tuple(name for name in others if name not in left_out),
        left_out=left_out,
    )


def has_images(schema: pa.Schema) -> bool:
    """Whether a table may hold images, not only name them."""
    return any(_holds_images(kind) for kind in schema.types)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return is_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _only(candidates: list[str]) -> tuple[str, ...]:
    return tuple(candidates) if len(candidates) == 1 else _IMAGE_COLUMNS


def _find_label(schema: pa.Schema, file: Path, wanted: str | None) -> str | None:
    named = [name for name, feature in features_of(schema).items() if _is_class_label(feature) and name in schema.names]
    usual = usual_columns(schema.names, LABEL_COLUMNS)
    if wanted is None and not usual:
        if len(named) > 1:
            raise ValueError(
                f"{file} has more than one column of labels: {', '.join(named)}. Name one by --label-column, or pack "
                "without labels (--no-labels)"
            )
        if not named:
            return None
    found = find_column(schema.names, wanted, (*usual, *named), file, "labels", "--label-column")
    kind = schema.field(found).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    are_numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not (are_numbers or _is_text(kind)):
        if wanted is None and found not in named:
            return None  # "label" may be anything
        raise ValueError(f"{file}: column {found!r} is of type {kind}; a label is text or a whole number")
    return found


def _is_class_label(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    feature = features_of(schema).get(label) if label is not None else None
    names = feature["names"] if isinstance(feature, dict) and _is_class_label(feature) else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None
