"""A part of a store: the features of a block of samples as one parquet file, there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.files import atomic_write
from data_pipelines.shards.index import NO_LABEL
from eval.store.layout import Layout

_ABOUT = b"selfsight"
TOKENS, GRID = "tokens", "grid"
#: Of the columns that are no features.
BESIDE = ("sample", "key", "label", "metadata", "digest")
_BATCH_BYTES = 1 << 26  # decoded at a time


class Part(NamedTuple):
    """n images of a block, in the order of their numbers.

    rows: (n, dim) of the kept type. tokens: (n, t, d) float16 or None; (t, d), one image's behind the other's, with
    `grids` (n, 2) int64 where images have their own shape. labels: (n,) int64, -1 where unknown. samples, digests: (n,)
    int64. keys: n names. metadata: of each image its `.json` as one line; None where it has none.
    """

    rows: np.ndarray
    tokens: np.ndarray | None
    labels: np.ndarray
    samples: np.ndarray
    digests: np.ndarray
    keys: Sequence[str]
    metadata: Sequence[str | None]
    grids: np.ndarray | None = None


def write_part(path: Path, part: Part, layout: Layout, digest: str) -> None:
    """Write a part of the store whose identity has this `digest`. Each piece of a row is a column of its own.

    The columns are sample, key, label (null where unknown), metadata (JSON), digest, then lists of fixed length:
    `class`, `mean` and so on, and `tokens` row by row of the image; of images at their own shape, whose lists are of
    unlike length, `grid` tells rows and columns.
    """
    columns: dict[str, pa.Array] = {
        "sample": pa.array(part.samples, pa.int64()),
        "key": pa.array(part.keys, pa.string()),
        "label": pa.array(part.labels, pa.int64(), mask=part.labels == NO_LABEL),
        "metadata": pa.array(part.metadata, pa.string()),
        "digest": pa.array(part.digests, pa.int64()),
    }
    for name, start, stop in layout.pieces:
        columns[name] = _lists(part.rows[:, start:stop])
    if part.grids is not None:
        assert part.tokens is not None
        columns[GRID] = _lists(part.grids)
        ends = part.grids.prod(axis=1).cumsum() * layout.token_dim
        flat = pa.array(np.ascontiguousarray(part.tokens).reshape(-1))
        columns[TOKENS] = pa.LargeListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int64()), flat)
    elif part.tokens is not None:
        columns[TOKENS] = _lists(part.tokens)
    about = json.dumps({"store": digest, "layout": layout.as_json()})
    table = pa.table(columns).replace_schema_metadata({_ABOUT: about.encode()})
    # features hardly get smaller by compressing; keys and metadata do
    with atomic_write(path) as file:
        pq.write_table(
            table,
            file,
            compression={name: "zstd" if name in BESIDE else "none" for name in columns},
            use_dictionary=False,
            write_statistics=["sample", "label"],
            data_page_size=1 << 24,
        )


def part_rows(path: Path, digest: str) -> int | None:
    """Rows of a part of the store with this digest; None where there is none, or a damaged one.

    Raises ValueError where it is another store's.
    """
    try:
        found = pq.read_metadata(path)
        about = json.loads((found.metadata or {})[_ABOUT])
        whose = about["store"]
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return None
    if whose != digest:
        raise ValueError(f"{path} holds features of another encoder, data or crops; choose another folder")
    rows: int = found.num_rows
    return rows


def part_samples(path: Path) -> np.ndarray:
    """(n,) int64 numbers of the samples in a part."""
    samples: np.ndarray = pq.read_table(path, columns=["sample"])["sample"].to_numpy()
    return samples


def part_digests(path: Path) -> np.ndarray:
    """(n,) int64 digests of the crops in a part."""
    digests: np.ndarray = pq.read_table(path, columns=["digest"])["digest"].to_numpy()
    return digests


def read_part(path: Path, layout: Layout) -> Iterator[Part]:
    """A part, some rows at a time, so that tokens need not all be in memory."""
    file = pq.ParquetFile(path)
    grid, has_tokens = layout.grid or (0, 0), TOKENS in file.schema_arrow.names
    row_bytes = 4 * layout.dim + (2 * grid[0] * grid[1] * layout.token_dim if has_tokens else 0)
    for batch in file.iter_batches(max(1, _BATCH_BYTES // row_bytes), use_threads=False):
        first = batch.column(layout.pieces[0].name)
        rows = np.empty((batch.num_rows, layout.dim), first.type.value_type.to_pandas_dtype())
        for name, start, stop in layout.pieces:
            rows[:, start:stop] = _matrix(batch.column(name), stop - start)
        tokens = grids = None
        if GRID in file.schema_arrow.names:
            grids = _matrix(batch.column(GRID), 2)
            tokens = batch.column(TOKENS).flatten().to_numpy(zero_copy_only=False).reshape(-1, layout.token_dim)
        elif has_tokens:
            flat = _matrix(batch.column(TOKENS), grid[0] * grid[1] * layout.token_dim)
            tokens = flat.reshape(batch.num_rows, grid[0] * grid[1], layout.token_dim)
        labels = batch.column("label").fill_null(NO_LABEL).to_numpy(zero_copy_only=False)
        yield Part(
            rows,
            tokens,
            labels,
            batch.column("sample").to_numpy(zero_copy_only=False),
            batch.column("digest").to_numpy(zero_copy_only=False),
            batch.column("key").to_pylist(),
            batch.column("metadata").to_pylist(),
            grids,
        )


def _lists(values: np.ndarray) -> pa.FixedSizeListArray:
    """A list of fixed length for each of n."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(values.shape[1:])))


def _matrix(column: pa.FixedSizeListArray, width: int) -> np.ndarray:
    matrix: np.ndarray = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix
