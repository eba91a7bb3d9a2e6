"""Crops of their own shape, from the places they were written to into one sequence.

Each crop is written into a place of the most patches that it may have; what a micro-batch has of them lies one behind
the other: view by view, in each of them row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: The kinds of crops, each with patches, positions and lengths of its own.
KINDS = ("global", "local")
#: What every batch has beside them.
_PLAIN = ("labels", "ids", "rows")
#: What stays on the host: it says how long each image is.
LENGTHS = tuple(f"{kind}_{name}" for kind in KINDS for name in ("positions", "lengths"))


def packed(fields: dict[str, Tensor], pinned: bool) -> dict[str, Tensor]:
    """A micro-batch of rows of unlike length, in memory of its own.

    Of each kind: `KIND_patches` (t, p * p * c), rows of the image first, in a patch row, column, channel;
    `KIND_positions` (t, 2) int64, row and column of each in its image; `KIND_lengths` (n,) int64, patches of each
    of the n = v * b images, view by view. What was drawn of each patch of the global crops (b, v, most) becomes (t,).
    """
    made = {name: fields[name] for name in _PLAIN}
    for kind in KINDS:
        if f"{kind}_patches" not in fields:
            continue
        grids = fields[f"{kind}_grids"].numpy().swapaxes(0, 1).reshape(-1, 2)  # (v b) 2
        lengths = grids.prod(axis=1)
        made[f"{kind}_patches"] = _joined(fields[f"{kind}_patches"], lengths, pinned)
        made[f"{kind}_positions"] = torch.from_numpy(rows_and_columns(grids))
        made[f"{kind}_lengths"] = torch.from_numpy(lengths)
        if kind == "global":
            drawn = [name for name in fields if name not in _PLAIN and not name.endswith(("_patches", "_grids"))]
            made |= {name: _joined(fields[name], lengths, pinned) for name in drawn}
    return made


def _joined(places: Tensor, lengths: np.ndarray, pinned: bool) -> Tensor:
    """Of places (b, v, most, ...) as many as each has: (t, ...), view by view."""
    out = torch.empty((int(lengths.sum()), *places.shape[3:]), dtype=places.dtype, pin_memory=pinned)
    arrays, rows = places.numpy(), places.shape[0]
    parts = [arrays[number % rows, number // rows, :length] for number, length in enumerate(lengths.tolist())]
    np.concatenate(parts, out=out.numpy())
    return out


def rows_and_columns(grids: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """(t, 2) int64: row and column of each patch in its image, of images of these rows and columns."""
    sides = np.asarray(grids, dtype=np.int64).reshape(-1, 2)
    lengths = sides.prod(axis=1)
    number = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    return np.stack(np.divmod(number, np.repeat(sides[:, 1], lengths)), axis=1)
