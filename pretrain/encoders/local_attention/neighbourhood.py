"""Attention of every cell of a map to the k x k cells around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders.attention import attend
from pretrain.encoders.residual import group_norm
from pretrain.encoders.tables import built_once


def attend_to_neighbours(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Softmax over the k x k cells around each of query . (key + rows[a] + columns[b]), times their values.

    Args:
        query, key, value: (b, heads, d, h, w). Beyond the map a key is 0 and attended to all the same, by its place
            alone, and so is its value, 0. Products are not scaled.
        rows, columns: (heads or 1, d, k) what is added to a key a rows below the first of the neighbourhood, and b
            columns right of it. A neighbourhood begins k // 2 cells before its cell.

    Returns (b, heads, d, h, w).

    Queries go block by block of k x k, whose neighbourhoods have (2 k - 1)^2 cells together: keys are copied 4 times,
    not k^2 times, and all products are matrix products.
    """
    kernel, height, width = rows.shape[-1], query.shape[3], query.shape[4]
    fill = (-height % kernel, -width % kernel)
    before, after = kernel // 2, kernel - 1 - kernel // 2
    blocks = rearrange(
        F.pad(query, (0, fill[1], 0, fill[0])), "b h d (y p) (x q) -> (b y x) h p q d", p=kernel, q=kernel
    )

    def around(cells: Tensor) -> Tensor:
        cells = F.pad(cells, (before, after + fill[1], before, after + fill[0]))
        windows = cells.unfold(3, 2 * kernel - 1, kernel).unfold(4, 2 * kernel - 1, kernel)
        return rearrange(windows, "b h d y x u v -> (b y x) h (u v) d")

    place = placement(kernel, query.device).to(rows.dtype)
    rows, columns = (table.expand(query.shape[1], -1, -1) for table in (rows, columns))
    by_row = torch.einsum("n h p q d, h d a, p a u -> n h p q u", blocks, rows, place)
    by_column = torch.einsum("n h p q d, h d b, q b v -> n h p q v", blocks, columns, place)
    bias = rearrange(by_row, "n h p q u -> n h p q u 1") + rearrange(by_column, "n h p q v -> n h p q 1 v")
    bias = rearrange(bias, "n h p q u v -> n h (p q) (u v)") + beyond(kernel, query.device).to(bias.dtype)
    mixed = attend(rearrange(blocks, "n h p q d -> n h (p q) d"), around(key), around(value), bias, scale=1.0)
    y = (height + fill[0]) // kernel
    x = (width + fill[1]) // kernel
    whole = rearrange(mixed, "(b y x) h (p q) d -> b h d (y p) (x q)", y=y, x=x, p=kernel)
    return whole[..., :height, :width]


@built_once
def placement(kernel: int, device: torch.device) -> Tensor:
    """(k, k, 2 k - 1): 1 where cell u of a block's surroundings is the a-th neighbour of the block's cell p, else 0."""
    p, a, u = torch.meshgrid(
        torch.arange(kernel, device=device),
        torch.arange(kernel, device=device),
        torch.arange(2 * kernel - 1, device=device),
        indexing="ij",
    )
    return (u == p + a).float()


@built_once
def beyond(kernel: int, device: torch.device) -> Tensor:
    """(k * k, (2 k - 1)^2): 0 for pairs of a block's cell and a cell of its neighbourhood, -inf for others."""
    near = placement(kernel, device).sum(dim=1)
    both = rearrange(near, "p u -> p 1 u 1") * rearrange(near, "q v -> 1 q 1 v")
    outside = torch.zeros_like(both).masked_fill(both == 0, float("-inf"))
    return rearrange(outside, "p q u v -> (p q) (u v)")


class NeighbourAttention(nn.Module):
    """The paper's layer (equations 3 and 4): queries, keys and values by 1x1 convolutions; half of a head's channels
    know the row of a key within the neighbourhood, the other half its column, alike for all heads."""

    def __init__(self, dim: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        half = dim // heads // 2
        self.rows = nn.Parameter(torch.randn(half, kernel) * (2 * half) ** -0.5)
        self.columns = nn.Parameter(torch.randn(half, kernel) * (2 * half) ** -0.5)

    def forward(self, cells: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d, h, w)."""
        query, key, value = rearrange(self.qkv(cells), "b (three g d) h w -> three b g d h w", three=3, g=self.heads)
        half = self.rows.shape[0]
        rows, columns = F.pad(self.rows, (0, 0, 0, half)), F.pad(self.columns, (0, 0, half, 0))
        mixed = attend_to_neighbours(query, key, value, rows[None], columns[None])
        return rearrange(mixed, "b g d h w -> b (g d) h w")


def shares_of_place(rows: Tensor, columns: Tensor, mix: Tensor) -> Tensor:
    """What each of m projections gives to the value of a place: (p, q, m), 1 in all, of vectors of rows (p, e), columns
    (q, e) and projections (m, e) (equation 5 of the paper)."""
    places = rearrange(rows @ mix.T, "p m -> p 1 m") + rearrange(columns @ mix.T, "q m -> 1 q m")
    return places.softmax(dim=-1)


class AttentionStem(nn.Module):
    """Attention within each 4x4 px, whose values are a mixture of several projections by their place there, and the
    largest of each 4x4 px (section 3.2 of the paper)."""

    side = 4

    def __init__(self, channels: int, dim: int, heads: int, mixtures: int) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Conv2d(channels, (2 + mixtures) * dim, 1, bias=False)  # queries, keys, values
        width = dim // heads
        self.rows = nn.Parameter(torch.randn(self.side, width))
        self.columns = nn.Parameter(torch.randn(self.side, width))
        self.mix = nn.Parameter(torch.randn(mixtures, width) * width**-0.5)
        self.norm = group_norm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, d, h / 4, w / 4)."""
        parts = rearrange(
            self.proj(images), "b (k g d) (y p) (x q) -> k b y x g (p q) d", g=self.heads, p=self.side, q=self.side,
            d=self.rows.shape[1],
        )  # fmt: skip
        query, key = parts[0], parts[1]
        shares = rearrange(shares_of_place(self.rows, self.columns, self.mix), "p q m -> m (p q) 1")
        value = (parts[2:] * rearrange(shares, "m n 1 -> m 1 1 1 1 n 1")).sum(dim=0)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        cells = rearrange(mixed, "b y x g (p q) d -> b (g d) (y p) (x q)", p=self.side)
        return F.max_pool2d(self.norm(cells).relu(), self.side)
