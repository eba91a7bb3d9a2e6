"""Where the replaced units of a batch are, counted on the host: a device would have to be waited for."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from data_pipelines.loader import Batch

INDEX = "token_index"


def note_hidden(batch: Batch) -> Batch:
    """The batch, on the host, with the numbers (n,) int64 of its replaced units beside its `token_mask`, if it has one.

    They count through the mask (b, gh, gw), image by image; through one of several views (b, v, gh, gw) view by view:
    as (v b) gh gw.
    """
    mask = batch.get("token_mask")
    if mask is None:
        return batch
    pinned = mask.is_pinned()  # what the loader has pinned is copied without a wait; this must be, too
    if mask.ndim == 4:
        mask = rearrange(mask, "b v gh gw -> (v b) gh gw")
    index = mask.flatten().nonzero().squeeze(1)
    return {**batch, INDEX: index.pin_memory() if pinned else index}


def hidden_index(batch: Batch) -> Tensor:
    """The numbers (n,) of `note_hidden`, of a batch that may have been made by hand."""
    if INDEX not in batch:
        batch = note_hidden(batch)
    return batch[INDEX]


def finer_index(index: Tensor, units: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The numbers of the tokens within these units, ascending, on a `grid` (h, w) of tokens that `units` (gh, gw)
    divides."""
    if units == grid:
        return index
    (height, width), (gh, gw) = (grid[0] // units[0], grid[1] // units[1]), units
    image, row, column = index // (gh * gw), index // gw % gh, index % gw
    rows = rearrange(row * height, "n -> n 1 1") + rearrange(torch.arange(height, device=index.device), "p -> 1 p 1")
    columns = rearrange(column * width, "n -> n 1 1") + rearrange(
        torch.arange(width, device=index.device), "q -> 1 1 q"
    )
    tokens = rearrange(image, "n -> n 1 1") * (grid[0] * grid[1]) + rows * grid[1] + columns
    return tokens.reshape(-1).sort().values
