"""Gram anchoring: how alike the patches of an image are to each other, held to what an earlier teacher says of it.

Long training makes global features better and patch features worse; the pairwise similarities of an earlier teacher's
patches hold the latter while features themselves stay free to move (Simeoni et al. 2025, DINOv3, section 4).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

#: What is done of similarities below zero: `keep` them as they are; `clip` both sides to zero, so that they are no
#: longer pulled at; `clip_teacher` the wanted ones only.
Negatives = Literal["keep", "clip", "clip_teacher"]


def gram_loss(student: Tensor, teacher: Tensor, normalise: bool = True, negatives: Negatives = "keep") -> Tensor:
    """Mean squared difference of the similarities of every two patches of an image; a scalar in fp32 under autocast
    too (Simeoni et al. 2025, equation 2).

    student (b, n, d), teacher (b, n, e): patch features of the same places, of widths that may differ. The teacher's
    are taken as they are: no gradient goes to them. `normalise`: similarities are cosines; else products.

    A mean over images: equal micro-batches on all ranks have the mean of their losses. Patches of several images
    compared with each other are those of one image (1, b * n, d), which only their own micro-batch has.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, wanted = (similarities(tokens, normalise) for tokens in (student, teacher.detach()))
        if negatives != "keep":
            wanted = wanted.clamp_min(0.0)
        if negatives == "clip":
            ours = ours.clamp_min(0.0)
        return F.mse_loss(ours, wanted)


def similarities(tokens: Tensor, normalise: bool = True) -> Tensor:
    """(b, n, n) fp32 of every two of the tokens (b, n, d) of an image: cosines, or products without `normalise`."""
    rows = tokens.float()
    if normalise:
        rows = F.normalize(rows, dim=-1, eps=1e-12)
    return rows @ rearrange(rows, "b n d -> b d n")


def on_grid(
    tokens: Tensor, grid: tuple[int, int], wanted: tuple[int, int], mode: Literal["bilinear", "bicubic"] = "bicubic"
) -> Tensor:
    """Patch features (b, n, d) of a map of `grid` (h, w) tokens brought to one of `wanted`, without antialiasing; as
    they are where both are equal."""
    if grid == wanted:
        return tokens
    maps = rearrange(tokens.float(), "b (h w) d -> b d h w", h=grid[0])
    maps = F.interpolate(maps, size=wanted, mode=mode, align_corners=False)
    return rearrange(maps, "b d h w -> b (h w) d")
