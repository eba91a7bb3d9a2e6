"""Images cut into patches and put together again."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """(b, c, h, w) -> (b, n, patch * patch * c), rows first; within a patch row, column, channel (MAE's order)."""
    return rearrange(images, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=patch, q=patch)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchify` for a grid of (h, w) patches."""
    return rearrange(patches, "b (gh gw) (p q c) -> b c (gh p) (gw q)", gh=grid[0], gw=grid[1], p=patch, q=patch)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch (b, n, 1): unbiased variance + 1e-6 under the root (MAE)."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def sincos_1d_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """(h * w, dim) fixed positions in fp32 of the raster number of each patch: half sine, half cosine, with frequencies
    10000^(-i / (dim / 2)) (Vaswani et al. 2017, section 3.5)."""
    assert dim % 2 == 0, f"sin-cos positions need an even dim, not {dim}"
    frequencies = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = np.outer(np.arange(grid[0] * grid[1]), frequencies)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """(h * w, dim) fixed positions in fp32: the first half of the channels encodes the column, the second the row.

    MAE's code meshes (width, height) and so puts the width axis first; half of each is sine, half cosine, with
    frequencies 10000^(-i / (dim / 4)).
    """
    assert dim % 4 == 0, f"sin-cos positions need a dim that is a multiple of 4, not {dim}"
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    parts = []
    for axis in (columns, rows):
        angles = np.outer(axis.reshape(-1), frequencies)
        parts += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()
