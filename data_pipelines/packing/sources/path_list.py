"""A list of image files: a CSV, TSV or parquet table with a column of paths."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

from data_pipelines.images.issues import shown
from data_pipelines.packing.listing import Listing, ListingEntry, Skipped, Spool
from data_pipelines.packing.sources.base import ANY_COLUMNS, Columns, Content, ListedSource, read_exactly
from data_pipelines.packing.sources.dicom_files import DicomFiles, group_of, path_of
from data_pipelines.packing.sources.splits import membership, split_kind

PATH_COLUMNS = ("path", "file_name", "filename", "file", "filepath", "file_path", "image_path", "image")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category")
SPLIT_COLUMNS = ("split",)
_NOT_THERE = "no such file"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_WHOLE_NUMBER = re.compile(r"([-+]?[0-9]{1,9})(\.0*)?")  # 7, and the 7.0 that tables with gaps make of it
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
#: What programs write of a value that is missing; the other words may be classes where labels are text.
_MISSING = ("", "nan", "<na>")
_MISSING_NUMBERS = (*_MISSING, "na", "n/a", "#n/a", "-nan", "null", "none", "inf", "-inf")


class PathListSource(ListedSource):
    """The images that a table names, in its order.

    A row names a file by its path, below `root` or absolute, and may name its label, its split and its group; all
    columns but path, label and split become its json, of a CSV as text. Of several rows with one path the first counts.
    Files that are not there are in `skipped`. Columns are found whatever the case of their names and the blanks around
    them, and blanks around values are left out.

    Labels are text, or whole numbers throughout, of which those below 0 are none. What is missing (empty, nan) is no
    label. Numbers with fractions are there to be predicted and are no classes: they stay in the json.

    Args:
        table: The .csv, .tsv or .parquet.
        root: Where relative paths begin.
        spool_folder: See `Listing`.
        columns: Of the path, the label and the group.
        labels: Whether to take labels at all.
        group_pattern: See `Listing`.

    Raises:
        FileNotFoundError: None of the files is there.
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
            label_column, are_numbers = self._labels_of(table, label_column, columns.label is not None, open_rows)
        split_column = next(iter(usual_columns(names, SPLIT_COLUMNS)), None)
        group_column = None
        if columns.group is not None:
            group_column = find_column(names, columns.group, (), table, "groups", "--group-column")
            self.listing.group_key = group_column
        missing: list[str] = []
        num_unlabelled = 0
        for row in rows:
            path = _stripped(row.pop(path_column))
            label = row.pop(label_column, None) if label_column else None
            split = _stripped(row.pop(split_column, None)) if split_column else None
            size = _size_of(root, path)
            if size is None:
                self.skipped.append(Skipped(str(path), _NOT_THERE))
                missing.append(str(path))
                continue
            group = (
                None if group_column is None else group_text(row.get(group_column), group_column, f"{table}: {path}")
            )
            metadata = json.dumps(row, default=str).encode() if row else b""
            frames = self._dicom.entries(root / path, path)
            if isinstance(frames, Skipped):
                self.skipped.append(frames)
                continue
            place = self._metadata.append(metadata)
            kind = split_kind(str(split)) or str(split) or None if split is not None else None
            known = _label(label, are_numbers, table, path)
            num_unlabelled += known is None
            if frames and group is None:
                group = group_of(frames)
                self.listing.groups_frames |= group is not None
            for entry in frames or [ListingEntry(path, size)]:
                entry = entry._replace(json_offset=place, json_size=len(metadata))
                self.listing.add(entry, membership(kind, known, group))
            self.listing.note(metadata)
        if label_column is not None and num_unlabelled:
            self.notes.append(f"{num_unlabelled:,} images have no label in column {label_column}")
        self.notes += self._dicom.notes()
        self._metadata.flush()
        self.listing.finish()
        if not len(self.listing):
            raise FileNotFoundError(self._why_none(table, missing))
        self.memberships = self.listing.memberships

    def _labels_of(
        self, table: Path, column: str, wanted: bool, open_rows: Callable[[Path], tuple[list[str], Iterator[dict]]]
    ) -> tuple[str | None, bool]:
        """The column if its values are classes, and whether they are whole numbers; looks at all rows."""
        fractions: set[str] = set()
        num_text = num_known = 0
        for row in open_rows(table)[1]:
            value = _stripped(row[column])
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                continue
            text = str(value)
            if text.lower() in _MISSING_NUMBERS:
                continue
            num_known += 1
            if not _NUMBER.fullmatch(text) or (isinstance(value, str) and table.suffix == ".parquet"):
                num_text += 1
                break
            if not float(text).is_integer() and len(fractions) < 1000:
                fractions.add(text)
        if num_text or not fractions:
            return column, not num_text and num_known > 0
        what = f"column {column} holds numbers with fractions, such as {min(fractions)}, which are no classes"
        if wanted:
            raise ValueError(
                f"{table}: {what}; leave out --label-column to have them in the json of each image, or name a column "
                "of classes"
            )
        self.notes.append(f"{what}: no labels are packed, and the numbers are in the json of each image")
        return None, False

    def _why_none(self, table: Path, missing: list[str]) -> str:
        unusable = [one for one in self.skipped if one.reason != _NOT_THERE]
        told = []
        if missing:
            told.append(
                f"none of {'the' if not unusable else 'another'} {len(missing)} files that {table} names is there, the "
                f"first of them {self.root / missing[0]}; relative paths begin at {self.root} (--root)"
            )
        if unusable:
            first = unusable[0]
            told.insert(0, f"{table} names no image that is read, such as {shown(first.path)}: {first.reason}")
        return "; ".join(told) or f"{table} names no file; its lines below the first are to name one each"

    def close(self) -> None:
        self._metadata.close()
        super().close()

    def _content(self, number: int) -> Content:
        entry = self.listing.entry(number)
        metadata = self._metadata.read(entry.json_offset, entry.json_size) if entry.json_size else None
        image = self._dicom.content(self.root, entry)
        if image is not None:
            return Content(image, metadata)
        return Content(read_exactly(self.root / entry.path, entry.size), metadata)

    def _files_of(self, entry: ListingEntry) -> list[Path]:
        return [self.root / path_of(entry)]


def find_column(
    names: Sequence[str], wanted: str | None, usual: Sequence[str], table: Path, what: str, option: str
) -> str:
    """The column that is wanted, or the one with a usual name; in any case and with blanks around it.

    Raises:
        ValueError: There is none, or several differ only so; names those there are.
    """
    if wanted is not None:
        found = [wanted] if wanted in names else [name for name in names if _plain(name) == _plain(wanted)]
        if not found:
            raise ValueError(f"{table} has no column {wanted!r} for {what}; it has {', '.join(names)}")
    else:
        found = usual_columns(names, usual)
    if not found:
        raise ValueError(
            f"{table} has no column of {what} by a usual name ({', '.join(usual)}); it has {', '.join(names)}. Name "
            f"one by {option}"
        )
    same = [name for name in found if _plain(name) == _plain(found[0])]
    if len(same) > 1 and found[0] != _plain(found[0]) and found[0] != wanted:
        raise ValueError(f"{table} has the columns {', '.join(map(repr, same))}; name one by {option}")
    return found[0]


def usual_columns(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Those with a usual name, the most usual first; exactly so before in another case or with blanks around."""
    return [name for one in usual for name in sorted(names, key=lambda name: name != one) if _plain(name) == one]


def group_text(value: Any, column: str, what: str) -> str:
    """The group of an image; ValueError where it has none."""
    text = "" if value is None else str(value).strip()
    if text.lower() in _MISSING:
        raise ValueError(
            f"{what} is of no group: its column {column} is {value!r} (--group-column), and every image needs one so "
            "that none is on both sides. Fill the gap, or leave the row out"
        )
    return text


def _plain(name: str) -> str:
    return name.strip().lower()


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


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


def _size_of(root: Path, path: Any) -> int | None:
    if not isinstance(path, str) or not path:
        return None
    try:
        status = (root / path).stat()
    except (OSError, ValueError):  # ValueError: a zero byte in it
        return None
    return status.st_size if S_ISREG(status.st_mode) else None


def _label(value: Any, are_numbers: bool, table: Path, path: str) -> str | int | None:
    """A label as text, or as a number of 0 or more; None for no label."""
    value = _stripped(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, str) and value.lower() in (_MISSING_NUMBERS if are_numbers else _MISSING)):
        return None
    if are_numbers and isinstance(value, str):
        match = _WHOLE_NUMBER.fullmatch(value)
        value = int(match[1] if match else float(value))
    if isinstance(value, int):
        return value if value >= 0 else None
    if isinstance(value, str):
        return value
    raise ValueError(
        f"{table}: the label of {path} is {value!r}; a label is text or a whole number. Choose another column "
        "(--label-column), or pack without labels (--no-labels)"
    )
