"""Focal attention (Yang et al. 2021, section 3.2): near tokens one by one, far ones by the window."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from pretrain.encoders.attention import attend
from pretrain.encoders.tables import built_once

HIDDEN = -100.0  # added to the attention to what is no token, as in the authors' code


class WindowPool(nn.Module):
    """One token of the side x side tokens of a window: a weight for each place, shared by channels; first the mean."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.full((1, side * side), 1.0 / side**2))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, y * side, x * side, d) -> (b, y, x, d)."""
        windows = rearrange(tokens, "b (y h) (x w) d -> b y x d (h w)", h=self.side, w=self.side)
        return F.linear(windows, self.weight, self.bias).squeeze(-1)


class FocalAttention(nn.Module):
    """Attention of the tokens of a window to each other, to the tokens around it, and to pooled windows.

    Args:
        window: side in tokens. expand: tokens around it on each side.
        focal_window: side in pooled windows, of which this one is the middle. levels: 1 and those of pooled windows.

    The tokens around come from four copies of the map, shifted over its borders: there a window sees the opposite
    border, and where two copies overlap a token counts twice, each time with a bias of its own. The authors' weights
    are made for that.
    """

    def __init__(self, dim: int, heads: int, window: int, expand: int, focal_window: int, levels: int) -> None:
        super().__init__()
        self.heads, self.window, self.expand, self.focal_window = heads, window, expand, focal_window
        self.relative_position_bias_table = _table((2 * window - 1) ** 2, heads)
        if expand:
            around = 4 * (window**2 - (window - expand) ** 2)
            self.relative_position_bias_table_to_neighbors = _table(1, heads, window**2, around)
        # of what a window sees of each level of pooled cells: its own, and focal_window // 2 around them
        self.sides = tuple(focal_window + 2**level - 1 for level in range(levels - 1))
        self.relative_position_bias_table_to_windows = nn.ParameterList(
            _table(heads, (window + side - 1) ** 2) for side in self.sides
        )
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, pooled: list[Tensor], size: tuple[int, int]) -> Tensor:
        """tokens (b, H, W, d), whole windows; pooled: of level k (b, H 2^k / window, W 2^k / window, d).

        size: rows and columns that are the map's own. What fills up its last windows is attended to, as published,
        but not where a whole side is shorter than a window: the authors' windows then are as short.
        """
        query, near = self._query_and_rest(tokens)
        seen = [self._windows(near)]
        ringed = self.expand > 0 and min(size) > self.window
        if ringed:
            shifts = [(row, column) for row in (-self.expand, self.expand) for column in (-self.expand, self.expand)]
            copies = torch.cat([self._windows(torch.roll(near, shift, dims=(1, 2))) for shift in shifts], dim=2)
            seen.append(copies.index_select(2, _around(self.window, self.expand, tokens.device)))
        for level, cells in enumerate(pooled):
            _, far = self._query_and_rest(cells)
            seen.append(self._regions(far, level))
        bias = self._bias(ringed)
        count = (tokens.shape[1] // self.window, tokens.shape[2] // self.window)
        own = (min(size[0], self.window), min(size[1], self.window))
        others = bias.shape[-1] - self.window**2 - sum(side**2 for side in self.sides)
        hidden = _hidden(count, self.window, own, others, self.sides, tokens.device)
        bias = rearrange(bias + rearrange(hidden, "m j -> m 1 1 j"), "m n i j -> 1 (m n) i j")
        (query,) = self._heads(self._windows(query), 1)
        key, value = self._heads(torch.cat(seen, dim=2), 2)
        mixed = attend(query, key, value, bias)
        return self.proj(
            rearrange(mixed, "b (y x n) (h w) d -> b (y h) (x w) (n d)", y=count[0], x=count[1], h=self.window)
        )

    def _query_and_rest(self, cells: Tensor) -> list[Tensor]:
        """Queries (..., d), and keys beside values (..., 2 d)."""
        return list(self.qkv(cells).split([cells.shape[-1], 2 * cells.shape[-1]], dim=-1))

    def _windows(self, cells: Tensor) -> Tensor:
        """(b, H, W, d) -> (b, windows, tokens of each, d)."""
        return rearrange(cells, "b (y h) (x w) d -> b (y x) (h w) d", h=self.window, w=self.window)

    def _regions(self, cells: Tensor, level: int) -> Tensor:
        """Pooled cells (b, Y, X, d) -> (b, windows, those that each sees, d); zeros beyond the borders."""
        spatial = rearrange(cells, "b y x d -> b d y x")
        regions = F.unfold(spatial, self.sides[level], padding=self.focal_window // 2, stride=2**level)
        return rearrange(regions, "b (d j) m -> b m j d", d=cells.shape[3])

    def _heads(self, cells: Tensor, parts: int) -> Tensor:
        """(b, windows, j, parts * heads * d) -> (parts, b, windows * heads, j, d): images share a bias."""
        return rearrange(cells, "b m j (part n d) -> part b (m n) j d", part=parts, n=self.heads)

    def _bias(self, ringed: bool) -> Tensor:
        """(1, heads, tokens of a window, all that it sees)."""
        device = self.relative_position_bias_table.device
        own = self.relative_position_bias_table[relative_index(self.window, self.window, device)]
        parts = [rearrange(own, "i j n -> 1 n i j")]
        if ringed:
            parts.append(self.relative_position_bias_table_to_neighbors)
        for side, table in zip(self.sides, self.relative_position_bias_table_to_windows, strict=True):
            parts.append(rearrange(table[:, relative_index(self.window, side, device)], "n i j -> 1 n i j"))
        return torch.cat(parts, dim=-1)


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


@built_once
def relative_index(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries^2, keys^2) places, in a table of all offsets, of the tokens of two squares of these sides."""
    places = (torch.arange(side, device=device) for side in (queries, keys))
    offsets = rearrange(next(places), "i -> i 1") - next(places) + keys - 1
    rows = repeat(offsets, "i j -> (i k) (j l)", k=queries, l=keys)
    columns = repeat(offsets, "i j -> (k i) (l j)", k=queries, l=keys)
    return rows * (queries + keys - 1) + columns


@built_once
def _around(window: int, expand: int, device: torch.device) -> Tensor:
    """Of the tokens of a window in four copies of the map, shifted to all corners, those that are outside of it."""
    place = np.arange(window)
    after, before = place >= window - expand, place < expand  # of copies shifted back, and ahead
    copies = [rows[:, None] | columns for rows in (after, before) for columns in (after, before)]
    return torch.from_numpy(np.flatnonzero(copies)).to(device)


@built_once
def _hidden(
    count: tuple[int, int],
    window: int,
    own: tuple[int, int],
    others: int,
    sides: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """(windows, all that each sees), fp32, added to the attention: HIDDEN for what is no token.

    count: windows (rows, columns). own: rows and columns of a window that are tokens. others: tokens around a window,
    all of which are seen. sides: of the regions of pooled cells, which may lie beyond the borders.
    """
    windows = count[0] * count[1]
    inside = torch.zeros(window, window, device=device)
    inside[: own[0], : own[1]] = 1
    seen = [repeat(inside, "h w -> m (h w)", m=windows), torch.ones(windows, others, device=device)]
    for level, side in enumerate(sides):
        part = window // 2**level
        used = []
        for number, length in zip(count, own, strict=True):  # of a window cut short, the last parts have no token
            first = torch.arange(number * 2**level, device=device) * part + (window - part * 2**level) // 2
            used.append(first < (length if length < window else number * window))
        cells = (rearrange(used[0], "y -> 1 1 y 1") & used[1]).float()
        regions = F.unfold(cells, side, padding=(side - 2**level + 1) // 2, stride=2**level)
        seen.append(rearrange(regions, "1 j m -> m j"))
    return torch.where(torch.cat(seen, dim=1) > 0, 0.0, HIDDEN)
