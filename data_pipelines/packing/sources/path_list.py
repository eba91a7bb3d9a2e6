"""A list of image files: a CSV, TSV or parquet table with a column of paths."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

from data_pipelines.packing.listing import Listing, ListingEntry, Skipped, Spool
from data_pipelines.packing.sources.base import ANY_COLUMNS, Columns, Content, ListedSource, read_exactly
from data_pipelines.packing.sources.cells import (
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    find_column,
    fractions_note,
    group_text,
    label_of_cell,
    look_at_labels,
    split_of_cell,
    stripped,
    unlabelled_note,
    usual_columns,
)
from data_pipelines.packing.sources.csv_fields import CsvFields
from data_pipelines.packing.sources.dicom_files import DicomFiles, group_of, path_of
from data_pipelines.packing.sources.splits import membership

PATH_COLUMNS = ("path", "file_name", "filename", "file", "filepath", "file_path", "image_path", "image")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class PathListSource(ListedSource):
    """The images that a table names, in its order.

    A row names a file by its path, below `root` or absolute, and may name its label, its split, its group and its mask,
    a file likewise; all columns but path, label and split become its json, of a CSV as `CsvFields` says. Of several
    rows with one path the first counts. Files that are not there are in `skipped`. Columns are found whatever the case
    of their names and the blanks around them, and blanks around values are left out.

    What its labels and splits mean, say `look_at_labels`, `label_of_cell` and `split_of_cell`.

    Args:
        table: The .csv, .tsv or .parquet.
        root: Where relative paths begin.
        spool_folder: See `Listing`.
        columns: Of the path, the label, the group and the mask's path.
        labels: Whether to take labels at all.
        group_pattern: See `Listing`.

    Raises:
        FileNotFoundError: None of the files is there, or can be used.
        ValueError: A column is missing, a row has too few or too many fields, a label is neither text nor a number, or
            an image is of no group.
    """

    kind = "list"

    def __init__(
        self,
        table: Path,
        root: Path,
        spool_folder: Path,
        columns: Columns = ANY_COLUMNS,
        labels: bool = True,
        group_pattern: re.Pattern[str] | None = None,
        dicom_window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(root, Listing(spool_folder, group_pattern))
        self._dicom = DicomFiles(dicom_window)
        self._metadata = Spool(spool_folder)
        open_rows: Callable[[Path], tuple[list[str], Iterator[dict[str, Any]]]] = _rows_of_csv
        if table.suffix == ".parquet":
            from data_pipelines.packing.sources.table_files import rows_of_parquet

            open_rows = rows_of_parquet
        names, rows = open_rows(table)
        path_column = find_column(names, columns.image, PATH_COLUMNS, table, "paths", "--image-column")
        label_column, are_numbers = None, False
        if labels and (columns.label or usual_columns(names, LABEL_COLUMNS)):
            label_column = find_column(names, columns.label, LABEL_COLUMNS, table, "labels", "--label-column")
            values = (row[label_column] for row in open_rows(table)[1])
            are_numbers, fraction = look_at_labels(values, typed=table.suffix == ".parquet")
            if fraction is not None:
                self.notes.append(fractions_note(table, label_column, fraction, columns.label is not None))
                label_column = None
        split_column = next(iter(usual_columns(names, SPLIT_COLUMNS)), None)
        group_column = None
        if columns.group is not None:
            group_column = find_column(names, columns.group, (), table, "groups", "--group-column")
            self.listing.group_key = group_column
        self._mask_column = None
        if columns.mask is not None:
            self._mask_column = find_column(names, columns.mask, (), table, "paths of masks", "--mask-column")
        fields = None
        if table.suffix in _DELIMITERS:
            others = [name for name in names if name not in (path_column, label_column, split_column)]
            stay = [name for name in (group_column, self._mask_column) if name is not None]
            fields = CsvFields(others, open_rows(table)[1], stay)
        missing = num_unlabelled = 0
        for row in rows:
            path = stripped(row.pop(path_column))
            label = row.pop(label_column, None) if label_column else None
            split = split_of_cell(row.pop(split_column, None)) if split_column else None
            size = _size_of(root, path)
            if size is None:
                self.skipped.append(Skipped(str(path), "no such file"))
                missing += 1
                continue
            group = (
                None if group_column is None else group_text(row.get(group_column), group_column, f"{table}: {path}")
            )
            row = row if fields is None else fields.of_row(row)
            metadata = json.dumps(row, default=str).encode() if row else b""
            frames = self._dicom.entries(root / path, path)
            if isinstance(frames, Skipped):
                self.skipped.append(frames)
                continue
            place = self._metadata.append(metadata)
            known = label_of_cell(label, are_numbers, f"{table}: the label of {path}")
            num_unlabelled += known is None
            if frames and group is None:
                group = group_of(frames)
                self.listing.groups_frames |= group is not None
            for entry in frames or [ListingEntry(path, size)]:
                entry = entry._replace(json_offset=place, json_size=len(metadata))
                self.listing.add(entry, membership(split, known, group))
            self.listing.note(metadata)
            if self._mask_column is not None:
                self.listing.note(str(_size_of(root, stripped(row.get(self._mask_column)))).encode())
        if label_column is not None and num_unlabelled:
            self.notes.append(unlabelled_note(num_unlabelled, label_column))
        self.notes += fields.notes() if fields is not None else []
        self.notes += self._dicom.notes()
        self._metadata.flush()
        self.listing.finish()
        if not len(self.listing):
            raise FileNotFoundError(_nothing_there(table, root, self.skipped, missing > 0))
        self.memberships = self.listing.memberships

    def close(self) -> None:
        self._metadata.close()
        super().close()

    def _content(self, number: int) -> Content:
        entry = self.listing.entry(number)
        metadata = self._metadata.read(entry.json_offset, entry.json_size) if entry.json_size else None
        image = self._dicom.content(self.root, entry)
        if image is not None:
            return Content(image, metadata)
        return Content(read_exactly(self.root / entry.path, entry.size), metadata, self._masks(metadata))

    def _masks(self, metadata: bytes | None) -> tuple[tuple[str, bytes], ...]:
        """The mask that a row names, if it is there: its path stays in the json."""
        path = stripped(json.loads(metadata or b"{}").get(self._mask_column))
        size = None if self._mask_column is None else _size_of(self.root, path)
        return () if size is None else (("mask.png", read_exactly(self.root / path, size)),)

    def _files_of(self, entry: ListingEntry) -> list[Path]:
        return [self.root / path_of(entry)]


def _rows_of_csv(table: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns, and the rows one by one."""
    if table.suffix not in _DELIMITERS:
        raise ValueError(f"{table} is no list; a list of paths ends in {', '.join(_DELIMITERS)} or .parquet")
    file = table.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(file, delimiter=_DELIMITERS[table.suffix])
    names = [name.strip() for name in next(reader, [])]
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


def _nothing_there(table: Path, root: Path, skipped: Sequence[Skipped], is_missing: bool) -> str:
    if not skipped:
        return f"{table} names no file; below its first line every line must name one"
    first = skipped[0]
    told = f"none of the {len(skipped)} files that {table} names can be used, the first of them {root / first.path}: "
    return told + first.reason + (f"; relative paths begin at {root} (--root)" if is_missing else "")


def _size_of(root: Path, path: Any) -> int | None:
    if not isinstance(path, str) or not path:
        return None
    try:
        status = (root / path).stat()
    except (OSError, ValueError):  # ValueError: a zero byte in it
        return None
    return status.st_size if S_ISREG(status.st_mode) else None
