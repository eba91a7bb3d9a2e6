"""A list of image files: a CSV, TSV or parquet table with a column of paths."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

from data_pipelines.packing.listing import Entry, Group, Listing, Skipped, Spool
from data_pipelines.packing.sources.base import ANY_COLUMNS, SPLIT_NAMES, Columns, Content, ListedSource, read_exactly

PATH_COLUMNS = ("path", "file_name", "filename", "file", "filepath", "file_path", "image_path", "image")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category")
_SPLIT_COLUMN = "split"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_WHOLE_NUMBER = re.compile(r"\s*(-?[0-9]{1,9})(\.0*)?\s*")  # 7, and the 7.0 that tables with gaps make of it


class PathListSource(ListedSource):
    """The images that a table names, in its order.

    A row names a file by its path, below `root` or absolute, and may name its label and its split; all other columns
    become its json, of a CSV as text. Of several rows with one path the first counts. Files that are not there are in
    `skipped`.

    Labels are text, or whole numbers throughout, of which those below 0 are none.

    Args:
        table: The .csv, .tsv or .parquet.
        root: Where relative paths begin.
        spool_folder: See `Listing`.
        columns: Of the path and of the label.
        labels: Whether to take labels at all.

    Raises:
        FileNotFoundError: None of the files is there.
        ValueError: A column is missing, a row has too few or too many fields, or a label is neither text nor a whole
            number.
    """

    kind = "list"

    def __init__(
        self, table: Path, root: Path, spool_folder: Path, columns: Columns = ANY_COLUMNS, labels: bool = True
    ) -> None:
        self.root = root
        self.listing = Listing(spool_folder)
        self.shards: dict[str, int] = {}
        self.classes: tuple[str, ...] | None = None
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self._metadata = Spool(spool_folder)
        is_parquet = table.suffix == ".parquet"
        if is_parquet:
            from data_pipelines.packing.sources.table_files import rows_of_parquet

            names, rows = rows_of_parquet(table)
        else:
            names, rows = _rows_of_csv(table)
        path_column = find_column(names, columns.image, PATH_COLUMNS, table, "paths", "--image-column")
        label_column = None
        if labels and (columns.label or any(name in LABEL_COLUMNS for name in names)):
            label_column = find_column(names, columns.label, LABEL_COLUMNS, table, "labels", "--label-column")
        missing = 0
        for row in rows:
            path = row.pop(path_column)
            label = row.pop(label_column, None) if label_column else None
            split = row.pop(_SPLIT_COLUMN, None)
            size = _size_of(root, path)
            if size is None:
                self.skipped.append(Skipped(str(path), "no such file"))
                missing += 1
                continue
            metadata = json.dumps(row, default=str).encode() if row else b""
            entry = Entry(path, size, 0, 0, self._metadata.append(metadata), len(metadata))
            if split is not None:
                split = SPLIT_NAMES.get(str(split), str(split)) or None
            self.listing.add(entry, Group(split, _label(label, table, path)))
            self.listing.note(metadata)
        self._metadata.flush()
        self.listing.finish()
        if not len(self.listing):
            raise FileNotFoundError(
                f"none of the {missing} files that {table} names is there, the first of them "
                f"{root / self.skipped[0].path if self.skipped else ''}; relative paths begin at {root} (--root)"
            )
        self.groups = _numbered(self.listing.groups, text_too=not is_parquet)

    def close(self) -> None:
        self._metadata.close()
        super().close()

    def _content(self, number: int) -> Content:
        entry = self.listing.entry(number)
        metadata = self._metadata.read(entry.json_offset, entry.json_size) if entry.json_size else None
        return Content(read_exactly(self.root / entry.path, entry.size), metadata)


def find_column(
    names: Sequence[str], wanted: str | None, usual: Sequence[str], table: Path, what: str, option: str
) -> str:
    """The column that is wanted, or the one with a usual name.

    Raises:
        ValueError: There is none; names those there are.
    """
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{table} has no column {wanted!r} for {what}; it has {', '.join(names)}")
        return wanted
    for name in usual:
        if name in names:
            return name
    raise ValueError(
        f"{table} has no column of {what} by a usual name ({', '.join(usual)}); it has {', '.join(names)}. Name one "
        f"by {option}"
    )


def _rows_of_csv(table: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns, and the rows one by one."""
    if table.suffix not in _DELIMITERS:
        raise ValueError(f"{table} is no list; a list of paths ends in {', '.join(_DELIMITERS)} or .parquet")
    file = table.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(file, delimiter=_DELIMITERS[table.suffix])
    names = next(reader, [])
    if len(set(names)) < len(names) or not names:
        file.close()
        raise ValueError(f"{table} begins with {','.join(names)!r}; its first line must name the columns, each once")

    def rows() -> Iterator[dict[str, Any]]:
        with file:
            try:
                for row in reader:
                    if row:
                        yield dict(zip(names, row, strict=True))
            except (csv.Error, ValueError) as error:
                raise ValueError(
                    f"{table}, line {reader.line_num}: {error}; every line needs a field for each of the columns "
                    f"{', '.join(names)}, quoted where there is a {_DELIMITERS[table.suffix]!r} in it"
                ) from error

    return names, rows()


def _size_of(root: Path, path: Any) -> int | None:
    if not isinstance(path, str) or not path:
        return None
    try:
        status = (root / path).stat()
    except (OSError, ValueError):  # ValueError: a zero byte in it
        return None
    return status.st_size if S_ISREG(status.st_mode) else None


def _label(value: Any, table: Path, path: str) -> str | int | None:
    """A label as it is stored, None for no label."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int | str) or value is None:
        return None if value == "" else value
    raise ValueError(
        f"{table}: the label of {path} is {value!r}; a label is text or a whole number. Choose another column "
        "(--label-column), or pack without labels (--no-labels)"
    )


def _numbered(groups: list[Group], text_too: bool) -> list[Group]:
    """Labels as numbers where all of them are; None instead of those below 0."""
    labels = [group.label for group in groups if group.label is not None]
    if any(isinstance(label, str) and not (text_too and _WHOLE_NUMBER.fullmatch(label)) for label in labels):
        return groups
    numbers = [None if group.label is None else _number(group.label) for group in groups]
    return [
        Group(group.split, None if number is None or number < 0 else number)
        for group, number in zip(groups, numbers, strict=True)
    ]


def _number(label: str | int) -> int:
    match = _WHOLE_NUMBER.fullmatch(label) if isinstance(label, str) else None
    return int(match[1] if match else label)
