"""Images larger than an encoder's own, seen through windows of its own size that slide over them."""

from __future__ import annotations

from itertools import product

import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders import Encoder, Features, Mask


class Sliding(Encoder):
    """An encoder that sees square windows of `window` px, at steps of half a window, and the last at the edge.

    What several windows say of a place is averaged: patch tokens where they lie; class and register tokens and the
    pooled feature over all windows. A linear layer on averaged tokens says the average of its logits on each.

    Raises ValueError for a window that is no multiple of the encoder's stride.
    """

    def __init__(self, encoder: Encoder, window: int) -> None:
        super().__init__()
        if window < encoder.stride or window % encoder.stride:
            raise ValueError(f"a window is {window} px; it must be a multiple of the encoder's stride {encoder.stride}")
        self.encoder, self.window = encoder, window
        self.dim, self.stride, self.patch, self.depth = encoder.dim, encoder.stride, encoder.patch, encoder.depth
        self.has_class_token, self.mean, self.std = encoder.has_class_token, encoder.mean, encoder.std

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        """Features of images (b, c, h, w) as of one pass, one window after the other; nothing may be hidden."""
        if mask is not None:
            raise ValueError("windows slide over whole images; nothing can be hidden from them")
        starts = [self.starts(length) for length in images.shape[2:]]
        seen: _Average | None = None
        for top, left in product(*starts):
            part = images[:, :, top : top + self.window, left : left + self.window]
            found = self.encoder(part, layers=layers)
            seen = seen or _Average(found, (images.shape[2], images.shape[3]), self.window)
            seen.add(found, (top, left))
        assert seen is not None
        return seen.features()

    def starts(self, length: int) -> list[int]:
        """Where windows begin along a side of `length` px; ValueError where it is shorter than one."""
        if length < self.window or length % self.stride:
            raise ValueError(f"an image of {length} px has no windows of {self.window} px at a stride of {self.stride}")
        step = max(self.stride, self.window // 2 // self.stride * self.stride)
        return [*range(0, length - self.window, step), length - self.window]

    def blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return self.encoder.blocks()


class _Average:
    """The mean of what windows say, of each place."""

    def __init__(self, first: Features, size: tuple[int, int], window: int) -> None:
        if first.grid is None:
            raise ValueError("this encoder's patch tokens form no map of the image, so that windows can't be joined")
        self.units = window // first.grid[0]  # px of a token
        self.grid = (size[0] // self.units, size[1] // self.units)
        self.sums = first.tokens.new_zeros(len(first.tokens), *self.grid, first.tokens.shape[2], dtype=torch.float32)
        self.counts = self.sums.new_zeros(1, *self.grid, 1)
        self.prefix = None if first.prefix_tokens is None else torch.zeros_like(first.prefix_tokens).float()
        self.pooled = torch.zeros_like(first.pooled).float()
        self.num = 0
        self.layers = [_Average(layer, size, window) for layer in first.layers]

    def add(self, found: Features, corner: tuple[int, int]) -> None:
        assert found.grid is not None
        top, left = (place // self.units for place in corner)
        rows, columns = slice(top, top + found.grid[0]), slice(left, left + found.grid[1])
        self.sums[:, rows, columns] += rearrange(found.tokens, "b (h w) d -> b h w d", h=found.grid[0])
        self.counts[:, rows, columns] += 1
        self.num += 1
        self.pooled += found.pooled
        if self.prefix is not None and found.prefix_tokens is not None:
            self.prefix += found.prefix_tokens
        for layer, each in zip(self.layers, found.layers, strict=True):
            layer.add(each, corner)

    def features(self) -> Features:
        tokens = rearrange(self.sums / self.counts, "b h w d -> b (h w) d")
        prefix = None if self.prefix is None else self.prefix / self.num
        layers = tuple(layer.features() for layer in self.layers)
        return Features(tokens, prefix, self.grid, None, self.pooled / self.num, layers)
