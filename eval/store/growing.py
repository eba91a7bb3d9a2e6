"""Features straight into arrays, without parts: for a cache, which is this machine's own."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.files import read_json, write_json
from eval.store.encoding import FrozenEncoder, unreadable
from eval.store.mapped import GrowingArray
from eval.store.matrix import write_complete
from eval.store.native_tokens import GrowingNativeTokens
from eval.store.precision import kept
from eval.store.progress import counting

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset

JOURNAL = "journal.json"
KEEP_SECONDS = 20.0  # of work that a kill costs at most


def write_arrays(
    encoder: FrozenEncoder,
    dataset: Dataset,
    samples: np.ndarray,
    dtype: np.dtype,
    folder: Path,
    digest: str,
    *,
    batch_size: int = 256,
    progress: bool = True,
) -> None:
    """Make the arrays of these ascending `samples` (n,) in a folder, or go on where an earlier process was ended.

    Raises ValueError where none of the samples can be read.
    """
    done, rows = _journal(folder, digest)
    layout = encoder.layout
    tails: dict[str, tuple[tuple[int, ...], np.dtype]] = {"features": ((layout.dim,), dtype)}
    tails |= dict.fromkeys(("samples", "labels", "digests"), ((), np.dtype(np.int64)))
    of_tokens = np.dtype(np.float16)
    native = encoder.with_tokens and encoder.crops.native
    if encoder.with_tokens and not native:
        assert layout.grid is not None
        tails["tokens"] = ((layout.grid[0] * layout.grid[1], layout.token_dim), of_tokens)
    with ExitStack() as stack:
        arrays: dict[str, GrowingArray] = {}
        tokens: GrowingNativeTokens | None = None

        def start(rows: int) -> None:
            nonlocal tokens
            for name, (tail, kind) in tails.items():
                arrays[name] = GrowingArray(folder / f"{name}.npy", tail, kind, rows)
                stack.callback(arrays[name].close)
            if native:
                tokens = GrowingNativeTokens(folder, layout.token_dim, of_tokens, rows)
                stack.callback(tokens.close)

        try:
            start(rows)
        except (OSError, ValueError):  # shorter than the journal says: from the beginning
            done = rows = 0
            start(0)

        def keep() -> None:
            for array in (*arrays.values(), *(() if tokens is None else (tokens,))):
                array.keep()
            write_json(folder / JOURNAL, {"of": digest, "done": done, "rows": arrays["samples"].rows})

        told = time.monotonic()
        with counting("features", len(samples), progress) as advance:
            advance(done)
            for batch in encoder.batches(dataset, samples[done:], batch_size):
                arrays["features"].append(kept(batch.rows, dtype, "features"))
                if batch.tokens is not None:
                    of_batch = kept(batch.tokens, of_tokens, "patch tokens")
                    if tokens is None:
                        arrays["tokens"].append(of_batch)
                    else:
                        assert batch.grids is not None
                        tokens.append(of_batch, batch.grids)
                arrays["samples"].append(batch.samples)
                arrays["labels"].append(batch.labels)
                arrays["digests"].append(batch.digests)
                now = int(np.searchsorted(samples, batch.samples[-1], side="right"))
                advance(now - done)
                done = now
                if time.monotonic() - told > KEEP_SECONDS:
                    keep()
                    told = time.monotonic()
        keep()
        if not (rows := arrays["samples"].rows):
            raise ValueError(unreadable(dataset, encoder.crops.channels, len(samples)))
    write_complete(folder, digest, rows, encoder.with_tokens)
    (folder / JOURNAL).unlink()


def _journal(folder: Path, digest: str) -> tuple[int, int]:
    """How many samples are done there, and how many rows they have given."""
    try:
        found = read_json(folder / JOURNAL)
        if found is not None and found["of"] == digest:
            return int(found["done"]), int(found["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, 0
