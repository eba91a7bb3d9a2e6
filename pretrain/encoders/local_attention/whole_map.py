"""Attention of every cell of a map to all others (Srinivas et al. 2021, bottleneck transformers)."""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders.attention import attend
from pretrain.encoders.places import Spot
from pretrain.encoders.relative import AbsolutePlaces, RelativeShift


class MapAttention(nn.Module):
    """Queries, keys and values by a 1x1 convolution; logits are queries times keys and times their places.

    Args:
        dim: of the maps it takes.
        heads, width: of attention, and of a head's queries and keys.
        grid: h, w of the maps that it is made for; of others the tables of places are interpolated.
        out: of the maps it gives; default: heads * width.
        scaled: of relative places, whether queries are scaled for them too (see `RelativeShift`).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        grid: tuple[int, int],
        places: Literal["relative", "absolute"] = "relative",
        *,
        out: int | None = None,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.widths = heads, (heads * width, heads * width, out or heads * width)
        self.qkv = nn.Conv2d(dim, sum(self.widths), 1, bias=False)
        self.places: RelativeShift | AbsolutePlaces
        self.places = RelativeShift(width, grid, scaled) if places == "relative" else AbsolutePlaces(width, grid)

    def forward(self, cells: Tensor) -> Tensor:
        """(b, d, h, w) to (b, out, h, w)."""
        grid = (cells.shape[2], cells.shape[3])
        query, key, value = (
            rearrange(part, "b (a e) h w -> b a (h w) e", a=self.heads)
            for part in self.qkv(cells).split(self.widths, dim=1)
        )
        mixed = attend(query, key, value, self.places.bias(query, Spot(grid, None), 0))
        return rearrange(mixed, "b a (h w) e -> b (a e) h w", h=grid[0])
