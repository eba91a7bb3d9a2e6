"""Arrays that grow row by row on the disk as NumPy's `.npy`, and are mapped into memory afterwards."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

HEADER_BYTES = 128  # room for any number of rows, so that it can be written last


class GrowingArray:
    """A `.npy` file of shape (rows, *tail) whose rows are written one after the other.

    Args:
        path: The file; where `rows` is not 0, one that has at least so many, of which the rest is forgotten.
        tail: The shape of a row.
        dtype: Of the values.
        rows: That are there already.
    """

    def __init__(self, path: Path, tail: tuple[int, ...], dtype: np.dtype | type, rows: int = 0) -> None:
        self.path, self.tail, self.dtype, self.rows = path, tail, np.dtype(dtype), rows
        row_bytes = int(np.prod(tail, dtype=np.int64)) * self.dtype.itemsize
        self._file = path.open("r+b" if rows else "w+b")
        try:
            if rows and path.stat().st_size < HEADER_BYTES + rows * row_bytes:
                raise ValueError(f"{path} is shorter than its {rows} rows")
            self._file.truncate(HEADER_BYTES + rows * row_bytes)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise

    def append(self, values: np.ndarray) -> None:
        """Add rows (n, *tail)."""
        assert values.shape[1:] == self.tail, (values.shape, self.tail)
        if values.size:
            np.ascontiguousarray(values, self.dtype).tofile(self._file)
        self.rows += len(values)

    def keep(self) -> None:
        """Bring what is there to the disk, with a header that says so much."""
        header = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {(self.rows, *self.tail)}, }}"
        room = HEADER_BYTES - 10
        assert len(header) < room
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + header.ljust(room - 1).encode() + b"\n")
        self._file.seek(0, os.SEEK_END)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave it as it is."""
        self._file.close()


def mapped(path: Path) -> np.ndarray:
    """A `.npy` file as an array of which only what is read comes into memory. What is written to it stays there.

    Raises OSError or ValueError where it is not there or not whole.
    """
    return np.load(path, mmap_mode="c", allow_pickle=False)


class GrowingTexts:
    """n texts as two arrays: their bytes one after the other, `NAME.npy`, and where each ends, `NAME_ends.npy`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._bytes = GrowingArray(folder / f"{name}.npy", (), np.uint8)
        self._ends = GrowingArray(folder / f"{name}_ends.npy", (), np.int64)

    def append(self, texts: Sequence[str]) -> None:
        """Add them."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = self._bytes.rows + np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes.append(np.frombuffer(b"".join(encoded), np.uint8))
        self._ends.append(ends)

    def keep(self) -> None:
        """See `GrowingArray.keep`."""
        self._bytes.keep()
        self._ends.keep()

    def close(self) -> None:
        """See `GrowingArray.close`."""
        self._bytes.close()
        self._ends.close()


class MappedTexts(Sequence[str]):
    """What `GrowingTexts` wrote, each text read when it is asked for."""

    def __init__(self, folder: Path, name: str, rows: np.ndarray | None = None) -> None:
        self._bytes, self._ends = mapped(folder / f"{name}.npy"), mapped(folder / f"{name}_ends.npy")
        self._rows = np.arange(len(self._ends)) if rows is None else rows

    def of(self, rows: np.ndarray) -> MappedTexts:
        """Those of these places (m,), in that order."""
        found = object.__new__(MappedTexts)
        found._bytes, found._ends, found._rows = self._bytes, self._ends, self._rows[rows]
        return found

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> MappedTexts: ...
    def __getitem__(self, place: int | slice) -> str | MappedTexts:
        if isinstance(place, slice):
            return self.of(np.arange(len(self))[place])
        row = int(self._rows[place])
        begin = int(self._ends[row - 1]) if row else 0
        return bytes(self._bytes[begin : int(self._ends[row])]).decode("utf-8", "surrogateescape")
