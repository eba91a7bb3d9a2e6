"""Patch tokens of images at their own shape: one flat array, where each image's end in it, and their grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.store.mapped import GrowingArray, mapped

TOKENS, ENDS, GRIDS = "tokens.npy", "token_ends.npy", "grids.npy"


class GrowingNativeTokens:
    """n images' tokens as `tokens.npy` (t, d), one image's behind the other's, `token_ends.npy` (n,) and `grids.npy`
    (n, 2), rows and columns of each.

    Args:
        folder: Where they lie, or will.
        dim: Of a token.
        dtype: Of the tokens.
        rows: Images that are there already; raises OSError or ValueError where they are not.
    """

    def __init__(self, folder: Path, dim: int, dtype: np.dtype, rows: int = 0) -> None:
        there = int(mapped(folder / ENDS)[rows - 1]) if rows else 0
        self._tokens = GrowingArray(folder / TOKENS, (dim,), dtype, there)
        self._ends = GrowingArray(folder / ENDS, (), np.int64, rows)
        self._grids = GrowingArray(folder / GRIDS, (2,), np.int64, rows)

    def append(self, tokens: np.ndarray, grids: np.ndarray) -> None:
        """Add tokens (t, d) of images of these grids (n, 2)."""
        ends = self._tokens.rows + grids.prod(axis=1).cumsum()
        self._tokens.append(tokens)
        assert not len(ends) or self._tokens.rows == ends[-1], (tokens.shape, grids)
        self._ends.append(ends)
        self._grids.append(grids)

    def keep(self) -> None:
        """See `GrowingArray.keep`."""
        for array in (self._tokens, self._ends, self._grids):
            array.keep()

    def close(self) -> None:
        """See `GrowingArray.close`."""
        for array in (self._tokens, self._ends, self._grids):
            array.close()


class StoredNativeTokens:
    """What `GrowingNativeTokens` wrote, mapped; see `eval.base.NativeTokens`.

    Raises OSError or ValueError where it is not there or not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._values, ends, grids = (mapped(folder / name) for name in (TOKENS, ENDS, GRIDS))
        if len(ends) != len(grids) or len(self._values) != (ends[-1] if len(ends) else 0):
            raise ValueError(f"{folder} holds {len(self._values)} tokens, not what its {ENDS} and {GRIDS} say")
        self._ends, self.dim = ends, int(self._values.shape[1])
        self.grids, self._rows = torch.from_numpy(np.array(grids)), np.arange(len(ends))

    def of(self, rows: np.ndarray) -> StoredNativeTokens:
        """Those of these places (m,), in that order."""
        found = object.__new__(StoredNativeTokens)
        found._values, found._ends, found.dim = self._values, self._ends, self.dim
        found.grids, found._rows = self.grids[torch.from_numpy(rows)], self._rows[rows]
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, rows: Tensor) -> list[Tensor]:
        """(t_i, d) float32 of each of the images `rows` (b,)."""
        found = []
        for row in self._rows[rows.cpu().numpy()].tolist():
            begin = int(self._ends[row - 1]) if row else 0
            found.append(torch.from_numpy(self._values[begin : int(self._ends[row])]).float())
        return found
