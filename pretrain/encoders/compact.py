"""The visible units of a pyramid's image moved together: one in every 2x2 makes a dense map of half the side.

UM-MAE (Li et al. 2022, section 3.1). Hidden pixels are never read, and every token keeps the raster indices of the
units it stands for.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from pretrain.encoders.base import Mask


class Compact:
    """Moves maps of a batch of images (h, w px) as its mask's visible units are moved.

    Args:
        mask: `drop` (b, gh, gw) with exactly one visible unit in every 2x2.
        image_size: h, w in px.
    """

    def __init__(self, mask: Mask, image_size: tuple[int, int]) -> None:
        assert mask.drop is not None
        self.drop, self.image_size = mask.drop, image_size
        self.grid = (mask.drop.shape[1], mask.drop.shape[2])
        quads = rearrange(mask.drop, "b (gh dy) (gw dx) -> b (gh gw) (dy dx)", dy=2, dx=2)
        if mask.num_visible is None and not bool((quads.sum(-1) == 3).all()):
            raise ValueError("pyramids need exactly one visible unit in every 2x2 (mask.kind one_in_2x2)")
        self._corner = (~quads).to(torch.uint8).argmax(dim=-1)  # (b, n) which of the four is visible
        self.replaced = None
        if mask.token is not None:
            self.replaced = rearrange(self.move(rearrange(mask.token, "b gh gw -> b gh gw 1")), "b h w 1 -> b h w")

    def move(self, cells: Tensor) -> Tensor:
        """From a map of cells (b, H, W, f), a multiple of the mask's grid, those of the visible units: half the sides.

        A map of batch 1 is the same for all images.
        """
        cells = cells.expand(len(self.drop), -1, -1, -1)
        p, q = cells.shape[1] // self.grid[0], cells.shape[2] // self.grid[1]
        quads = rearrange(cells, "b (gh dy p) (gw dx q) f -> b (gh gw) (dy dx) (p q f)", dy=2, dx=2, p=p, q=q)
        chosen = quads.gather(2, repeat(self._corner, "b n -> b n 1 f", f=quads.shape[-1]))
        return rearrange(chosen, "b (gh gw) 1 (p q f) -> b (gh p) (gw q) f", gh=self.grid[0] // 2, p=p, q=q)

    def images(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> (b, c, h / 2, w / 2)."""
        return rearrange(self.move(rearrange(images, "b c h w -> b h w c")), "b h w c -> b c h w")

    def positions(self, positions: Tensor) -> Tensor:
        """Positions (1, H, W, d) of a map of the whole image, brought to its compact form (b, H / 2, W / 2, d).

        Where a token is larger than a unit, it gets the mean over the units it stands for.
        """
        height, width = positions.shape[1], positions.shape[2]
        if height >= self.grid[0]:
            return self.move(positions)
        scale = self.grid[0] // height
        fine = repeat(positions, "1 h w d -> 1 (h p) (w q) d", p=scale, q=self.grid[1] // width)
        return reduce(self.move(fine), "b (h p) (w q) d -> b h w d", "mean", h=height // 2, w=width // 2)

    def units(self, stride: int) -> Tensor:
        """(b, n, k): the raster indices each output token of `stride` px stands for, over the finer of the mask's grid
        and the token grid of the whole image."""
        fine = tuple(max(g, side // stride) for g, side in zip(self.grid, self.image_size, strict=True))
        raster = torch.arange(fine[0] * fine[1], device=self.drop.device)
        moved = self.move(rearrange(raster, "(h w) -> 1 h w 1", w=fine[1]))
        height, width = (side // 2 // stride for side in self.image_size)
        return rearrange(moved, "b (h p) (w q) 1 -> b (h w) (p q)", h=height, w=width)
