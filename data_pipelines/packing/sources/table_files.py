"""Parquet and arrow files read row group by row group, in memory that does not grow with them. Needs pyarrow."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ValueError(
        "reading parquet and arrow files needs pyarrow, which is not installed: "
        "pip install '.[parquet]' in the checkout of selfsight"
    ) from error

_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 8 << 20  # of a row group too large to be read at once


class TableFile(Protocol):
    """A table in row groups; for one thread at a time."""

    schema: pa.Schema
    num_groups: int

    def group_size(self, group: int, column: str) -> tuple[int, int]:
        """Rows of a row group, and about how many bytes a column has there."""

    def read(self, group: int, columns: Sequence[str], first: int, last: int) -> Iterator[pa.RecordBatch]:
        """The rows [first, last) of a row group. Names with a dot that no column has are fields of structs, which
        then hold no others."""

    def fingerprint(self) -> bytes:
        """Something that differs when the file does, without reading all of it."""

    def close(self) -> None: ...

    def __enter__(self) -> TableFile: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_table(path: Path) -> TableFile:
    """Open a .parquet or .arrow file.

    Raises:
        ValueError: It is none, or damaged.
    """
    try:
        return ParquetTable(path) if path.suffix == ".parquet" else ArrowTable(path)
    except (pa.ArrowException, struct.error) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix} ({error}); fetch or write it again") from error


class _Closing:
    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ParquetTable(_Closing):
    """A row group is read forward, batch by batch; what is further on in the one at hand costs no new beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.num_groups = self._file.num_row_groups
        self._place: tuple[int, tuple[str, ...]] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None  # the last one read, which begins at row _start
        self._start = 0

    def group_size(self, group: int, column: str) -> tuple[int, int]:
        found = self._file.metadata.row_group(group)
        chunks = (found.column(place) for place in range(found.num_columns))
        sizes = (
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
        )
        return found.num_rows, sum(sizes)

    def read(self, group: int, columns: Sequence[str], first: int, last: int) -> Iterator[pa.RecordBatch]:
        place = (group, tuple(columns))
        if place != self._place or self._batch is None or first < self._start:
            found = self._file.metadata.row_group(group)
            rows, num_bytes = found.num_rows, found.total_byte_size
            batch_size = max(1, min(rows, _BATCH_BYTES * rows // max(1, num_bytes)))
            self._batches = self._file.iter_batches(
                batch_size, row_groups=[group], columns=list(columns), use_threads=False
            )
            self._place, self._batch, self._start = place, next(self._batches, None), 0
        while self._batch is not None:
            end = self._start + self._batch.num_rows
            if first < end:
                yield self._batch.slice(first - self._start, min(last, end) - first)
                first = min(last, end)
            if first >= last:
                return
            self._batch, self._start = next(self._batches, None), end
        raise OSError(f"{self._path}: row group {group} has {self._start} rows, and had {last} or more before")

    def fingerprint(self) -> bytes:
        """Size and footer, which says where everything lies."""
        with self._path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(size - 8)
            length = struct.unpack("<I4s", file.read(8))[0]
            file.seek(size - 8 - length)
            return struct.pack("<q", size) + file.read(length)

    def close(self) -> None:
        self._batches, self._batch = iter(()), None
        self._file.close()


class ArrowTable(_Closing):
    """Record batches of an IPC stream or file, mapped into memory: only what is looked at is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = pa.memory_map(str(path))
        self._offsets: list[int] = []  # of the record batches of a stream
        self._reader: pa.RecordBatchFileReader | None = None
        if self._file.read(6) == b"ARROW1":
            self._reader = pa.ipc.open_file(self._file)
            self.schema, self.num_groups = self._reader.schema, self._reader.num_record_batches
            return
        self._file.seek(0)
        self.schema = pa.ipc.read_schema(pa.ipc.read_message(self._file))
        if any(pa.types.is_dictionary(kind) for kind in self.schema.types):
            raise ValueError(f"{path} is a stream with dictionaries; write it as parquet, or as an arrow file")
        while (offset := self._file.tell()) < self._file.size():
            try:
                message = pa.ipc.read_message(self._file)
            except EOFError:  # the end marker
                break
            if message.type == "record batch":
                self._offsets.append(offset)
        self.num_groups = len(self._offsets)

    def _group(self, group: int) -> pa.RecordBatch:
        if self._reader is not None:
            return self._reader.get_batch(group)
        self._file.seek(self._offsets[group])
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._file), self.schema)

    def group_size(self, group: int, column: str) -> tuple[int, int]:
        batch = self._group(group)
        return batch.num_rows, batch.column(column).nbytes

    def read(self, group: int, columns: Sequence[str], first: int, last: int) -> Iterator[pa.RecordBatch]:
        batch = self._group(group)
        if batch.num_rows < last:
            raise OSError(f"{self._path}: record batch {group} has {batch.num_rows} rows, and had more before")
        stored = set(self.schema.names)
        wanted = {name if name in stored else name.partition(".")[0] for name in columns}
        yield batch.slice(first, last - first).select(sorted(wanted))

    def fingerprint(self) -> bytes:
        return struct.pack(f"<q{len(self._offsets)}q", self._file.size(), *self._offsets)

    def close(self) -> None:
        self._file.close()


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def features_of(schema: pa.Schema) -> Mapping[str, Any]:
    """What Hugging Face's `datasets` wrote of the columns; empty where it did not."""
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def rows_of_parquet(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns but those of bytes, and the rows one by one, as JSON knows them."""
    with open_table(path) as table:
        names = [name for name in table.schema.names if not is_binary(table.schema.field(name).type)]

    def rows() -> Iterator[dict[str, Any]]:
        with open_table(path) as table:
            for group in range(table.num_groups):
                for batch in table.read(group, names, 0, table.group_size(group, names[0])[0]):
                    yield from map(plain, batch.to_pylist())

    return names, rows()


def plain(value: Any) -> Any:
    """A value as JSON knows it: dates as text, what is not a number as null, bytes left out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value if not isinstance(item, bytes)]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
