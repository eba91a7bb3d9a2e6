"""Crops of several sizes, one for all images of a step: the loader makes the largest, the device the others of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data_pipelines.loader import Batch
from data_pipelines.rng import Purpose, Stream
from data_pipelines.transforms.config import MixedSizes


def sizes_of_step(mixed: Sequence[MixedSizes], seed: int, step: int) -> MixedSizes:
    """Which of `mixed` a step has: by their shares, a function of (seed, step) alone."""
    left = Stream(seed, Purpose.SIZES, step).random() * sum(each.share for each in mixed)
    for each in mixed:
        left -= each.share
        if left < 0:
            return each
    return mixed[-1]


def resized(batch: Batch, sizes: MixedSizes) -> Batch:
    """The batch with its crops at these sizes."""
    changed = dict(batch)
    for name in ("global_crops", "local_crops", "teacher_crops"):
        size = getattr(sizes, name)
        if size is not None and name in batch:
            changed[name] = _smaller(batch[name], size)
    return changed


def _smaller(crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops (b, v, c, h, w) of integers at another size: bicubic with antialiasing, as the loader's."""
    if crops.shape[-2:] == size:
        return crops
    flat = rearrange(crops, "b v c h w -> (b v) c h w").float()
    made = F.interpolate(flat, size=size, mode="bicubic", antialias=True, align_corners=False)
    made = made.round_().clamp_(0, torch.iinfo(crops.dtype).max).to(crops.dtype)
    return rearrange(made, "(b v) c h w -> b v c h w", b=len(crops))
