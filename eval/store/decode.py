"""The parts of a store as arrays beside them: decoded once, mapped ever after."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_pipelines.files import lock, sync
from data_pipelines.remote.fetch import pause
from eval.store.description import Description
from eval.store.mapped import GrowingArray, GrowingTexts
from eval.store.matrix import MappedFeatures, check_room, write_complete
from eval.store.native_tokens import GrowingNativeTokens
from eval.store.parts import read_part

MAPPED = "npy"  # the folder of arrays beside the parts
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def decode_store(folder: Path, description: Description, say: Callable[[str], None]) -> None:
    """Make the arrays of a complete store, unless another process makes them meanwhile: then wait for it.

    Raises ValueError where the disk has too little room, OSError where it can't be written to.
    """
    try:
        with (folder / f".{MAPPED}.lock").open("w") as file:
            waited = False
            while not lock(file):
                if not waited:
                    say(f"waiting for another process, which decodes {folder}")
                waited = True
                pause(0.2)
            if waited or (folder / MAPPED).is_dir():
                try:
                    MappedFeatures(folder / MAPPED, description.layout, description.digest)
                    return
                except (OSError, ValueError, KeyError, TypeError):  # damaged, or of an earlier store here
                    shutil.rmtree(folder / MAPPED, ignore_errors=True)
            _decode(folder, description, say)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        raise OSError(
            f"{folder} can't be written to ({error.strerror}), and its features are decoded beside it once before they "
            "are read; let whoever may write there run the same `selfsight embed` with --npy"
        ) from error


def _decode(folder: Path, description: Description, say: Callable[[str], None]) -> None:
    assert description.rows is not None
    check_room(folder, array_bytes(description, description.rows), f"decoding {folder}")
    new = folder / f".{MAPPED}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    layout, identity, rows = description.layout, description.identity, 0
    say(f"decoding {description.num_parts} parts of {folder}, once")
    with ExitStack() as stack:

        def growing(name: str, tail: tuple[int, ...], dtype: np.dtype | type) -> GrowingArray:
            array = GrowingArray(new / f"{name}.npy", tail, dtype)
            stack.callback(array.close)
            return array

        features = growing("features", (layout.dim,), np.dtype(identity["features"]))
        beside = {name: growing(name, (), np.int64) for name in ("samples", "labels", "digests")}
        texts = {name: GrowingTexts(new, name) for name in ("keys", "metadata")}
        for text in texts.values():
            stack.callback(text.close)
        tokens: GrowingArray | GrowingNativeTokens | None = None
        if identity["tokens"] is not None and identity["crops"].get("native"):
            tokens = GrowingNativeTokens(new, layout.token_dim, np.dtype(identity["tokens"]))
            stack.callback(tokens.close)
        elif identity["tokens"] is not None:
            assert layout.grid is not None
            tokens = growing(
                "tokens", (layout.grid[0] * layout.grid[1], layout.token_dim), np.dtype(identity["tokens"])
            )
        for number in range(description.num_parts):
            for part in read_part(description.path(folder, number), layout):
                features.append(part.rows)
                if isinstance(tokens, GrowingNativeTokens):
                    assert part.tokens is not None
                    assert part.grids is not None
                    tokens.append(part.tokens, part.grids)
                elif tokens is not None:
                    assert part.tokens is not None
                    tokens.append(part.tokens)
                beside["samples"].append(part.samples)
                beside["labels"].append(part.labels)
                beside["digests"].append(part.digests)
                texts["keys"].append(part.keys)
                texts["metadata"].append([text or "" for text in part.metadata])
                rows += len(part.samples)
        for array in (features, *beside.values(), *texts.values(), *(() if tokens is None else (tokens,))):
            array.keep()
    if rows != description.rows:
        raise ValueError(
            f"the parts of {folder} hold {rows:,} rows and its store.json says {description.rows:,}; remove the folder "
            "and make the store again"
        )
    write_complete(new, description.digest, rows, tokens is not None)
    new.rename(folder / MAPPED)
    sync(folder)


def array_bytes(description: Description, rows: int) -> int:
    """Of the features and tokens of so many rows, as they are kept."""
    return rows * row_bytes(description.identity)


def row_bytes(identity: dict) -> int:
    """Of the features and tokens of one image, as they are kept; at its own shape, of one with the most tokens."""
    found = identity["layout"]
    size = max(stop for _, _, stop in found["pieces"]) * np.dtype(identity["features"]).itemsize
    if identity["tokens"] is not None:
        size += found["grid"][0] * found["grid"][1] * found["token_dim"] * np.dtype(identity["tokens"]).itemsize
    return size
