"""Pictures of a run, as one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange

if TYPE_CHECKING:
    from torch import Tensor


ROW_HEIGHT = 64  # px; lower pictures are enlarged towards it


def enlargement(height: int, scale_to: int = ROW_HEIGHT) -> int:
    """How many times as large a sheet shows pictures of a height."""
    return max(1, scale_to // height)


def contact_sheet(pictures: Tensor, shown: Sequence[int] = (0,), scale_to: int = ROW_HEIGHT) -> np.ndarray[Any, Any]:
    """(n, c, h, w) uint8 pictures under each other, small ones enlarged, as an (H, W, 3) array.

    Of pictures that are neither grey nor RGB, the channels of the numbers `shown`: one as grey, or three.
    """
    if pictures.shape[1] not in (1, 3):
        pictures = pictures[:, list(shown)]
    factor = enlargement(pictures.shape[2], scale_to)
    enlarged = pictures.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    sheet = rearrange(enlarged.cpu(), "n c h w -> (n h) w c").numpy()
    return np.ascontiguousarray(np.broadcast_to(sheet, (*sheet.shape[:2], 3)))
