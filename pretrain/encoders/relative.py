"""Positions between tokens: a learned bias (BEiT, Bao et al. 2022), or products of queries with a table of distances by
rows and by columns (Bello et al. 2019; Srinivas et al. 2021, bottleneck transformers)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from pretrain.encoders.places import Spot
from pretrain.encoders.positions import resize_line, resize_relative_table
from pretrain.encoders.tables import built_once

#: Rows of a bias's table after those of distances: prefix to patch, patch to prefix, prefix to prefix.
EXTRA = 3


class RelativeBias(nn.Module):
    """A bias for each head and offset of rows and columns; with `prefix` three more for tokens that lie nowhere."""

    def __init__(self, heads: int, grid: tuple[int, int], prefix: bool) -> None:
        super().__init__()
        self.grid, self.extra = grid, EXTRA if prefix else 0
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + self.extra
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))

    def bias(self, query: Tensor, spot: Spot, num_prefix: int) -> Tensor:
        """(1 or b, heads, p + n, p + n) of whole maps, or of the units that are left of them."""
        table = resize_relative_table(self.relative_position_bias_table, self.grid, spot.grid, self.extra)
        if not self.extra:  # tokens that lie nowhere, and have no rows
            table = F.pad(table, (0, 0, 0, EXTRA))
        index = offsets(spot.grid, num_prefix, table.device)
        if spot.units is None:
            return rearrange(table[index], "i j heads -> 1 heads i j")
        tokens = with_prefix(spot.units, num_prefix)
        return rearrange(table[index[tokens[:, :, None], tokens[:, None]]], "b i j heads -> b heads i j")


def with_prefix(units: Tensor, num_prefix: int) -> Tensor:
    """Numbers (b, p + n) of the tokens of an image, of its `units` (b, n)."""
    prefix = repeat(torch.arange(num_prefix, device=units.device), "p -> b p", b=len(units))
    return torch.cat([prefix, units + num_prefix], dim=1)


@built_once
def offsets(grid: tuple[int, int], num_prefix: int, device: torch.device) -> Tensor:
    """(p + n, p + n) the row of a bias's table for each query and key."""
    height, width = grid
    rows = rearrange(torch.arange(height, device=device), "h -> h 1").expand(height, width).flatten()
    columns = rearrange(torch.arange(width, device=device), "w -> 1 w").expand(height, width).flatten()
    down = rearrange(rows, "q -> q 1") - rearrange(rows, "k -> 1 k") + height - 1
    right = rearrange(columns, "q -> q 1") - rearrange(columns, "k -> 1 k") + width - 1
    count, after = num_prefix + height * width, (2 * height - 1) * (2 * width - 1)
    index = torch.empty(count, count, dtype=torch.int64, device=device)
    index[num_prefix:, num_prefix:] = down * (2 * width - 1) + right
    index[:num_prefix] = after
    index[:, :num_prefix] = after + 1
    index[:num_prefix, :num_prefix] = after + 2
    return index


class RelativeShift(nn.Module):
    """Tables of distances (2 h - 1, e) and (2 w - 1, e), row r of key minus query = r - (h - 1), shared by the heads.

    A whole map takes them from relative to absolute by shifting; units that are left, by their numbers.

    scaled: whether the queries are scaled by e^-.5 here as they are for keys, or not, as timm's BottleneckAttn has it.
    """

    def __init__(self, width: int, grid: tuple[int, int], scaled: bool = True) -> None:
        super().__init__()
        self.scale = width**-0.5 if scaled else 1.0
        self.relative_rows = nn.Parameter(torch.randn(2 * grid[0] - 1, width) * width**-0.5)
        self.relative_columns = nn.Parameter(torch.randn(2 * grid[1] - 1, width) * width**-0.5)

    def bias(self, query: Tensor, spot: Spot, num_prefix: int) -> Tensor:
        """(b, heads, p + n, p + n) of queries (b, heads, p + n, e) times distances; prefix tokens have 0."""
        (height, width), scaled = spot.grid, query[:, :, num_prefix:] * self.scale
        rows, columns = (
            resize_line(table, 2 * side - 1).to(query.dtype)
            for table, side in ((self.relative_rows, height), (self.relative_columns, width))
        )
        if spot.units is None:
            cells = rearrange(scaled, "b a (h w) e -> b a h w e", h=height)
            along_row = relative_to_absolute(cells @ columns.T)  # b a h w and the key's column
            along_column = relative_to_absolute(
                rearrange(cells @ rows.T, "b a h w r -> b a w h r")
            )  # b a w h, key's row
            both = rearrange(along_column, "b a w h k -> b a h w k 1") + rearrange(
                along_row, "b a h w l -> b a h w 1 l"
            )
            logits = rearrange(both, "b a h w k l -> b a (h w) (k l)")
        else:
            at = (spot.units // width, spot.units % width)
            logits = sum(
                (scaled @ table.T).gather(3, _distances(places, side).expand(-1, query.shape[1], -1, -1))
                for table, places, side in zip((rows, columns), at, spot.grid, strict=True)
            )
        return F.pad(logits, (num_prefix, 0, num_prefix, 0))


class AbsolutePlaces(nn.Module):
    """Vectors of rows (h, e) and columns (w, e), shared by the heads: a query's product with those of a key's place is
    added to that with the key (Srinivas et al. 2021, table 4)."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.rows = nn.Parameter(torch.randn(grid[0], width) * width**-0.5)
        self.columns = nn.Parameter(torch.randn(grid[1], width) * width**-0.5)

    def bias(self, query: Tensor, spot: Spot, num_prefix: int) -> Tensor:
        """As `RelativeShift.bias`."""
        rows, columns = (
            resize_line(table, side).to(query.dtype)
            for table, side in zip((self.rows, self.columns), spot.grid, strict=True)
        )
        places = rearrange(rearrange(rows, "h e -> h 1 e") + columns, "h w e -> (h w) e")
        if spot.units is not None:
            places = rearrange(places[spot.units], "b k e -> b 1 k e")
        logits = query[:, :, num_prefix:] * self.scale @ rearrange(places, "... k e -> ... e k")
        return F.pad(logits, (num_prefix, 0, num_prefix, 0))


def _distances(places: Tensor, side: int) -> Tensor:
    """(b, 1, n, n) rows of a table of distances for each query and key, of places (b, n) along a `side`."""
    return rearrange(places, "b k -> b 1 1 k") - rearrange(places, "b q -> b 1 q 1") + side - 1


def relative_to_absolute(products: Tensor) -> Tensor:
    """Products of queries with distances (..., l, 2 l - 1) to those with keys (..., l, l).

    Element r of query q is of key q + r - (l - 1).

    A column more makes each row begin one further to the left than the one before, once all are cut anew.
    """
    length = products.shape[-2]
    flat = rearrange(F.pad(products, (0, 1)), "... q r -> ... (q r)")
    shifted = rearrange(F.pad(flat, (0, length - 1)), "... (q r) -> ... q r", r=2 * length - 1)
    return shifted[..., :length, length - 1 :]
