"""How many units a mask hides and leaves; masks that would hide or leave nothing are refused (imports no torch)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.methods.masks import MaskConfig


def mask_grid(mask: MaskConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of mask units in an image of `image_size` (h, w) px."""
    return image_size[0] // mask.unit, image_size[1] // mask.unit


def num_hidden(mask: MaskConfig, grid: tuple[int, int]) -> int:
    """Units hidden in every image (blockwise: at most so many).

    MAE keeps int(n * (1 - ratio)) and SimMIM hides ceil(n * ratio): the same number, here free of float rounding.
    BEiT hides int(n * ratio).
    """
    exact = round(grid[0] * grid[1] * mask.ratio, 6)
    return math.floor(exact) if mask.kind == "blockwise" else math.ceil(exact)


def num_shown(mask: MaskConfig, grid: tuple[int, int]) -> int:
    """Visible units that stay as they are, where `mask.secondary` makes the others a mask token; as UM-MAE counts."""
    visible = grid[0] * grid[1] - num_hidden(mask, grid)
    return int(round(visible * (1 - mask.secondary), 6))


def check_mask_counts(mask: MaskConfig, image_size: tuple[int, int]) -> None:
    """Raise ValueError for a mask that hides no unit, so that there is nothing to learn, or leaves none to learn it
    from."""
    grid = mask_grid(mask, image_size)
    units, hidden, shown = grid[0] * grid[1], num_hidden(mask, grid), num_shown(mask, grid)
    if hidden and shown:
        return
    share = f"ratio={mask.ratio:g}" + (f" and secondary={mask.secondary:g}" if mask.secondary else "")
    raise ValueError(
        f"method.mask {'leaves no unit visible' if hidden else 'hides no unit'}: at unit={mask.unit} px an image of "
        f"{image_size[0]}x{image_size[1]} px has {units} ({grid[0]}x{grid[1]}), of which {share} ({mask.kind}) leaves "
        f"{shown}. Take a smaller method.mask.unit, larger views.global_crops, or another "
        f"method.mask.{'secondary' if mask.secondary else 'ratio'}"
    )
