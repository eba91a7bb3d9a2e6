"""Which kind of source a path is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.datasets.locations import local_shards
from data_pipelines.packing.sources.base import ANY_COLUMNS, Columns, Source
from data_pipelines.packing.sources.folder import FolderSource
from data_pipelines.packing.sources.path_list import PathListSource
from data_pipelines.packing.sources.stack_folders import StackFolders
from data_pipelines.packing.sources.tars import TarSource
from data_pipelines.shards.scan import IMAGE_SUFFIXES

KINDS = ("folder", "stacks", "tars", "parquet", "arrow", "list")
_KIND_OF_SUFFIX = {".tar": "tars", ".parquet": "parquet", ".arrow": "arrow", ".csv": "list", ".tsv": "list"}
_SUFFIX_OF_KIND = {"tars": ".tar", "parquet": ".parquet", "arrow": ".arrow"}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
_MAX_FOLDERS = 100  # below the topmost, looked into to tell the kind


def open_source(
    spec: str | Path,
    spool_folder: Path,
    *,
    kind: str | None = None,
    root: Path | None = None,
    columns: Columns = ANY_COLUMNS,
    labels: bool = True,
    split_folders: bool = True,
    group_pattern: str | None = None,
    dicom_window: tuple[float, float] | None = None,
) -> Source:
    """List what `spec` holds.

    Args:
        spec: A folder, a file, or files by `*`, `?`, `[...]` or braces such as `{000..009}`.
        spool_folder: See `Listing`.
        kind: One of `KINDS`; None: by what is there.
        root: Where the relative paths of a list begin; default: the list's folder.
        columns: Of tables and lists.
        labels: Whether to take labels.
        split_folders: Whether folders named train, val and so on are splits, see `memberships_of_folders`.
        group_pattern: A regular expression that finds the group of an image in its path, see `Listing`.
        dicom_window: Centre and width by which DICOM files become images of 8 bits; None: all their levels are kept.

    Raises:
        FileNotFoundError: There is no such thing, or no image in it.
        ValueError: It is of no kind that is known, or of several.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--from is {kind!r}; it must be one of {', '.join(KINDS)}")
    path = Path(spec).expanduser()
    if path.is_dir():
        kind = kind or _kind_of_folder(path)
        if kind == "list":
            raise ValueError(f"{path} is a folder; name the list itself, a .csv, .tsv or .parquet file")
        files = _files_below(path, _SUFFIX_OF_KIND[kind]) if kind not in ("folder", "stacks") else []
        base = path
    else:
        if path.name.lower().endswith(_PACKED):
            raise ValueError(f"{path} is compressed; unpack it first, as its images cannot be read one by one")
        if not path.exists() and not any(letter in str(spec) for letter in "*?[{"):
            raise FileNotFoundError(f"{path} does not exist; name the folder of your images, or a file of them")
        files = local_shards(path)
        found = {file.suffix for file in files}
        kind = kind or (_kind_of_file(files[0]) if len(found) == 1 else None)
        if kind is None or kind in ("folder", "stacks"):
            raise ValueError(
                f"{path} is no source of images ({', '.join(sorted(found))}); name a folder, or files that end in "
                f"{', '.join(_KIND_OF_SUFFIX)}"
            )
        base = Path(os.path.commonpath([file.absolute().parent for file in files]))
        files = [file.absolute() for file in files]
    if columns != ANY_COLUMNS and kind in ("folder", "stacks", "tars"):
        raise ValueError(
            "--group-column, --image-column, --mask-column and --label-column are for tables, "
            f"and {path} is of kind {kind}"
            + ("; name its groups by --group-pattern" if columns.group is not None else "")
            + ("; name a folder of masks by --masks" if columns.mask is not None else "")
        )
    if group_pattern is not None and (kind in ("parquet", "arrow") or columns.group is not None):
        raise ValueError("--group-pattern finds groups in paths of files; a table names them by --group-column alone")
    pattern = _compiled(group_pattern)
    if root is not None and kind != "list":
        raise ValueError(f"--root is for lists of paths, and {path} is of kind {kind}")
    if kind == "stacks":
        return StackFolders(path, spool_folder, labels, split_folders, pattern)
    if kind == "folder":
        source = FolderSource(path, spool_folder, labels, split_folders, pattern, dicom_window)
        lists = sorted(file.name for file in path.iterdir() if _KIND_OF_SUFFIX.get(file.suffix) == "list")
        source.notes += [
            f"{name} is not read; to take labels and metadata from it, pack {path / name}" for name in lists
        ]
        return source
    if kind == "tars":
        return TarSource(files, base, spool_folder, labels, split_folders, pattern)
    if kind == "list":
        if len(files) > 1:
            raise ValueError(f"{path} names {len(files)} lists; join them into one")
        return PathListSource(files[0], root or files[0].parent, spool_folder, columns, labels, pattern, dicom_window)
    import data_pipelines.packing.sources.table_files  # noqa: F401  first, as it says how to install pyarrow
    from data_pipelines.packing.sources.tables import TableSource

    return TableSource(files, base, kind, spool_folder, columns, labels)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"--group-pattern is {pattern!r}, which is no regular expression ({error}); for the number in p12_003.png "
            "it is 'p([0-9]+)_'"
        ) from error


def _kind_of_file(file: Path) -> str | None:
    kind = _KIND_OF_SUFFIX.get(file.suffix)
    if kind == "parquet":
        from data_pipelines.packing.sources.table_files import open_table
        from data_pipelines.packing.sources.tables import has_images

        with open_table(file) as table:
            return "parquet" if has_images(table.schema) else "list"
    return kind


def _kind_of_folder(folder: Path) -> str:
    """By the files in it and, where there are none that tell, in the folders below."""
    found = _kinds_in(folder)
    if not found:
        below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        for name in below[:_MAX_FOLDERS]:
            found |= _kinds_in(Path(name))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(sorted(found))}; say which to pack (--from {min(found)})")
    return found.pop() if found else "folder"


def _kinds_in(folder: Path) -> set[str]:
    found = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = Path(entry.name).suffix.lower()
            if entry.name.startswith("."):
                continue
            if suffix[1:] in IMAGE_SUFFIXES:
                found.add("folder")
            elif suffix in _SUFFIX_OF_KIND.values():
                found.add(_KIND_OF_SUFFIX[suffix])
    return found


def _files_below(folder: Path, suffix: str) -> Sequence[Path]:
    found = sorted(
        path
        for path in folder.rglob(f"*{suffix}")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (suffix == ".arrow" and path.name.startswith("cache-"))
    )
    if not found:
        raise FileNotFoundError(f"{folder} holds no {suffix} file")
    return found
