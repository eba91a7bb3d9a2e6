"""A ViT for large maps, as ViTDet has it (Li et al. 2022, section 3): attention within windows in most blocks, and
decomposed relative positions (Li et al. 2022, MViTv2, section 4.1) that start at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from pretrain.encoders.base import Features, Windows
from pretrain.encoders.tables import built_once

if TYPE_CHECKING:
    from pretrain.encoders.vit.encoder import SkippingBlock, VitEncoder

MASKED = -1e4  # added to the product of a query and a token that only fills a window up


class WindowedVit(nn.Module):
    """A `VitEncoder` whose blocks attend as `Windows` says; images (b, c, h, w) to Features.

    With prefix tokens, nothing that fills, and relative positions at zero, a window that holds the whole map gives
    what the encoder gives.

    relative: for each block its tables, rows (2 * side - 1, d of a head) and columns; empty without them.
    """

    def __init__(self, encoder: VitEncoder, windows: Windows) -> None:
        super().__init__()
        if windows.everywhere and max(windows.everywhere) >= encoder.depth:
            raise ValueError(
                f"blocks {windows.everywhere} are to attend everywhere, and the encoder's are 0 .. {encoder.depth - 1}"
            )
        if not windows.prefix and encoder.config.pool == "class" and encoder.config.distillation_token:
            raise ValueError("class_token=false leaves a distillation token out too; keep them (class_token=true)")
        self.encoder = encoder
        self.windows = windows
        self.num_prefix = encoder.vit.num_prefix_tokens if windows.prefix else 0
        self.relative = nn.ModuleList(
            RelativePositions(self._side_of(block), encoder.dim // encoder.vit.blocks[0].attn.num_heads)
            for block in range(encoder.depth if windows.relative_positions else 0)
        )

    def _side_of(self, block: int) -> tuple[int, int]:
        """Rows and columns of what a block attends to, on the map that relative positions are made for."""
        if self.windows.side == 0 or block in self.windows.everywhere:
            return self.windows.grid or self.encoder.grid
        return self.windows.side, self.windows.side

    def _window_on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The sides of a window; no larger than the map, but where what fills it up is seen."""
        side = self.windows.side
        return (side, side) if self.windows.filler_seen else (min(side, grid[0]), min(side, grid[1]))

    def forward(self, images: Tensor) -> Features:
        states, grid, _ = self.encoder.embed(images, None)
        states = states[:, self.encoder.vit.num_prefix_tokens - self.num_prefix :]
        for number, block in enumerate(self.encoder.vit.blocks):
            whole = self.windows.side == 0 or number in self.windows.everywhere
            window = grid if whole else self._window_on(grid)
            tables = self.relative[number](window, stretched=whole) if len(self.relative) else None
            attended = self._attend(block, block.norm1(states), grid, window, tables)
            states = states + block.drop_path1(block.ls1(attended))
            states = states + block.drop_path2(block.ls2(block.mlp(block.norm2(states))))
        if self.windows.prefix:
            return self.encoder.features_of(states, grid, None)
        tokens = self.encoder.final_norm(states)
        return Features(tokens, None, grid, None, tokens.mean(dim=1), states=states)

    def _attend(
        self,
        block: SkippingBlock,
        normed: Tensor,
        grid: tuple[int, int],
        window: tuple[int, int],
        tables: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """What a block's attention makes of normed states (b, p + h * w, d) on a map of `grid`, window by window."""
        attention = block.attn
        num_prefix = self.num_prefix
        qkv = attention.qkv(normed)
        prefix, cells = qkv[:, :num_prefix], rearrange(qkv[:, num_prefix:], "b (h w) d -> b h w d", h=grid[0])
        counts = tuple(-(-side // own) for side, own in zip(grid, window, strict=True))
        padded = tuple(count * own for count, own in zip(counts, window, strict=True))
        cells = F.pad(cells, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        filler = None if padded == grid else filling(grid, padded, window, normed.device)
        if filler is not None and self.windows.filler_seen:  # zeros after the norm become the projection's bias
            outside = rearrange(filler, "(n m) (i j) -> (n i) (m j) 1", n=counts[0], i=window[0])
            cells = torch.where(outside, attention.qkv.bias.to(cells.dtype), cells)
            filler = None
        num = counts[0] * counts[1]
        cells = rearrange(cells, "b (n i) (m j) d -> (b n m) (i j) d", i=window[0], j=window[1])
        prefix = repeat(prefix, "b p d -> (b m) p d", m=num)
        query, key, value = rearrange(
            torch.cat([prefix, cells], dim=1), "b n (three h d) -> three b h n d", three=3, h=attention.num_heads
        )
        extra = extra_products(query, window, num_prefix, tables, filler)
        mixed = rearrange(attend_with(query, key, value, extra), "b h n d -> b n (h d)")
        prefix, cells = mixed[:, :num_prefix], mixed[:, num_prefix:]
        prefix = rearrange(prefix, "(b m) p d -> b m p d", m=num).mean(dim=1)
        cells = rearrange(cells, "(b n m) (i j) d -> b (n i) (m j) d", n=counts[0], m=counts[1], i=window[0])
        cells = rearrange(cells[:, : grid[0], : grid[1]], "b h w d -> b (h w) d")
        return attention.proj(attention.norm(torch.cat([prefix, cells], dim=1)))


class RelativePositions(nn.Module):
    """A vector for each distance in rows and in columns within `side`, whose product with a query is added to its
    attention; zero at first."""

    def __init__(self, side: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(2 * side[0] - 1, dim))
        self.columns = nn.Parameter(torch.zeros(2 * side[1] - 1, dim))

    def forward(self, side: tuple[int, int], stretched: bool) -> tuple[Tensor, Tensor]:
        """(h, h, d) and (w, w, d): of each query's row and key's row, and of the columns, on a map of `side`.

        stretched: whether the tables are interpolated linearly for it, as a whole map's are; else it is a part of
        what they were made for.
        """
        return _by_pairs(self.rows, side[0], stretched), _by_pairs(self.columns, side[1], stretched)


def _by_pairs(table: Tensor, side: int, stretched: bool) -> Tensor:
    """(side, side, d) the rows of a table of distances."""
    if not stretched:
        middle = len(table) // 2  # of no distance
        table = table[middle - side + 1 : middle + side]
    elif len(table) != 2 * side - 1:
        stretched = rearrange(table, "n d -> 1 d n").float()
        stretched = F.interpolate(stretched, size=2 * side - 1, mode="linear")
        table = rearrange(stretched, "1 d n -> n d").to(table.dtype)
    return table[distances(side, table.device)]


def extra_products(
    query: Tensor,
    window: tuple[int, int],
    num_prefix: int,
    tables: tuple[Tensor, Tensor] | None,
    filler: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """What queries (b, h, n, e) and keys (b or 1, 1, n, e) get as further axes, so that their products are the
    relative positions of the two (`RelativePositions`), and what hides the keys that only fill a window up; None where
    there is neither.

    Added as a bias they would be n x n for each image and head: 4,096 x 4,096 at 1,024 px.
    """
    queries, keys = [], []
    if tables is not None:
        cells = rearrange(query[:, :, num_prefix:], "b h (i j) d -> b h i j d", i=window[0])
        rows, columns = tables
        by_row = torch.einsum("bhijd,ikd->bhijk", cells, rows.to(cells.dtype))
        by_column = torch.einsum("bhijd,jkd->bhijk", cells, columns.to(cells.dtype))
        both = rearrange(torch.cat([by_row, by_column], dim=-1), "b h i j k -> b h (i j) k")
        queries.append(F.pad(both, (0, 0, num_prefix, 0)))
        places = F.pad(one_hot_places(window, query.device), (0, 0, num_prefix, 0))
        keys.append(rearrange(places, "n k -> 1 1 n k").to(query.dtype))
    if filler is not None:
        queries.append(query.new_ones(1, 1, 1, 1).expand(*query.shape[:3], 1))
        hidden = F.pad(filler, (num_prefix, 0)).to(query.dtype) * MASKED
        hidden = repeat(hidden, "m n -> (b m) 1 n 1", b=len(query) // len(hidden))
        if keys:
            keys = [keys[0].expand(len(hidden), -1, -1, -1)]
        keys.append(hidden)
    return (torch.cat(queries, dim=-1), torch.cat(keys, dim=-1)) if queries else None


def attend_with(query: Tensor, key: Tensor, value: Tensor, extra: tuple[Tensor, Tensor] | None) -> Tensor:
    """Attention (b, h, n, d), whose scaled products of query and key have those of `extra`'s two added."""
    if extra is None:
        return F.scaled_dot_product_attention(query, key, value)
    width = query.shape[-1]
    queries, keys = extra
    query = torch.cat([query * width**-0.5, queries.to(query.dtype)], dim=-1)
    key = torch.cat([key, keys.expand(*key.shape[:2], -1, -1)], dim=-1)
    wanted = -(-query.shape[-1] // 8) * 8  # fused kernels take heads of one width, a multiple of 8
    query, key, value = (F.pad(part, (0, wanted - part.shape[-1])) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :width]


@built_once
def distances(side: int, device: torch.device) -> Tensor:
    """(side, side) the row of a table of 2 * side - 1 distances for each query and key."""
    places = torch.arange(side, device=device)
    return rearrange(places, "q -> q 1") - rearrange(places, "k -> 1 k") + side - 1


@built_once
def one_hot_places(window: tuple[int, int], device: torch.device) -> Tensor:
    """(h * w, h + w) fp32: of each token of a window one 1 for its row and one for its column."""
    rows = repeat(torch.eye(window[0], device=device), "i k -> (i j) k", j=window[1])
    columns = repeat(torch.eye(window[1], device=device), "j k -> (i j) k", i=window[0])
    return torch.cat([rows, columns], dim=1)


@built_once
def filling(grid: tuple[int, int], padded: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """(windows, tokens) bool: which tokens of the windows of a `padded` map lie outside of `grid`."""
    rows = torch.arange(padded[0], device=device) >= grid[0]
    columns = torch.arange(padded[1], device=device) >= grid[1]
    outside = rearrange(rows, "h -> h 1") | rearrange(columns, "w -> 1 w")
    return rearrange(outside, "(n i) (m j) -> (n m) (i j)", i=window[0], j=window[1])
