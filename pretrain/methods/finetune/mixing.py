"""Mixup, cutmix and erasing on the device, by what was drawn on the host."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pretrain.methods.finetune.draws import Mixes
from pretrain.stream.from_host import from_host


def partners(values: Tensor, repeats: int = 1) -> Tensor:
    """What each row (b, ...) is mixed with: within every `2 * repeats` rows, the first half with the second.

    Rows that show one sample, `repeats` next to each other, so mix with another's. The global batch decides it alone:
    its micro-batches begin at multiples of `2 * repeats`.
    """
    halves = rearrange(values, "(n two r) ... -> n two r ...", two=2, r=repeats)
    return rearrange(halves.flip(1), "n two r ... -> (n two r) ...")


def inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, 1, h, w) bool, which pixels of images of `size` lie in boxes (b, 4): top, bottom, left, right."""
    rows = torch.arange(size[0], device=boxes.device)
    columns = torch.arange(size[1], device=boxes.device)
    top, bottom, left, right = (rearrange(side, "b -> b 1") for side in boxes.unbind(1))
    within_rows = rearrange((rows >= top) & (rows < bottom), "b h -> b 1 h 1")
    return within_rows & rearrange((columns >= left) & (columns < right), "b w -> b 1 1 w")


def mix(images: Tensor, targets: Tensor, drawn: Mixes, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """Images (b, c, h, w) and targets (b, k) mixed with their partners'."""
    share = from_host(drawn.share, images.device)
    mixed_targets = targets * rearrange(share, "b -> b 1") + partners(targets, repeats) * rearrange(
        1 - share, "b -> b 1"
    )
    others = partners(images, repeats)
    if drawn.is_cut.any():
        cut = torch.where(inside(from_host(drawn.boxes, images.device), images.shape[2:]), others, images)
        if drawn.is_cut.all():
            return cut, mixed_targets
        is_cut = rearrange(from_host(drawn.is_cut, images.device), "b -> b 1 1 1")
        weight = rearrange(share, "b -> b 1 1 1")
        return torch.where(is_cut, cut, images * weight + others * (1 - weight)), mixed_targets
    if (drawn.share == 1).all():
        return images, mixed_targets
    weight = rearrange(share, "b -> b 1 1 1")
    return images * weight + others * (1 - weight), mixed_targets


def erase(images: Tensor, boxes: np.ndarray, noise: Tensor) -> Tensor:
    """Normalised images (b, c, h, w) with their `boxes` (b, 4) filled with `noise` of the same shape."""
    if not boxes.any():
        return images
    return torch.where(inside(from_host(boxes, images.device), images.shape[2:]), noise, images)
