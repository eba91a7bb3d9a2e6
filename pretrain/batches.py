"""What happens to a batch between the loader and the method: to the device, counted, and proven to be the right one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.buffers import map_batch
from data_pipelines.loader import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on the device; copies from pinned memory overlap with computation."""
    if device.type == "cpu":
        return batch
    return map_batch(batch, lambda tensor: tensor.to(device, non_blocking=True))


def share_mask_counts(micro_batches: list[Batch], world_size: int) -> None:
    """Write into each micro-batch how many units are replaced per micro-batch, averaged over the global batch.

    Blockwise masks differ in size; a loss divided by this number averages to the loss of the global batch.
    """
    hidden = [batch["replaced"].sum() for batch in micro_batches if batch["replaced"] is not None]
    if not hidden:
        return
    count = torch.stack(hidden).sum().double()
    if world_size > 1:
        dist.all_reduce(count)
    for batch in micro_batches:
        batch["mean_hidden"] = (count / (world_size * len(micro_batches))).float()


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Seed torch's generators for drop path, so that a resumed run draws what an uninterrupted one would."""
    state = np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


def ids_digest(batch: Batch) -> int:
    """A number below 2^32 that depends on which sample is in which row of the global batch, in any order of rows."""
    ids = batch["ids"].cpu().numpy().astype(np.uint64)
    rows = batch["rows"].cpu().numpy().astype(np.uint64)
    mixed = (ids[:, 0] * np.uint64(0x9E3779B97F4A7C15)) ^ (ids[:, 1] + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (rows + np.uint64(1)) * np.uint64(0x94D049BB133111EB)) * np.uint64(0x9E3779B97F4A7C15)
    return int((mixed >> np.uint64(32)).sum()) % 2**32


def crop_sheet(batch: Batch, show: Callable[[Tensor], Tensor]) -> Tensor:
    """A row of all crops of each image (n, c, h, w) uint8, local ones below their size's height padded with black.

    `show` makes uint8 pictures of crops.
    """
    crops = [show(batch["global_crops"][:, view]) for view in range(batch["global_crops"].shape[1])]
    if batch["local_crops"] is not None:
        height = crops[0].shape[2]
        for view in range(batch["local_crops"].shape[1]):
            small = show(batch["local_crops"][:, view])
            crops.append(torch.nn.functional.pad(small, (0, 0, 0, height - small.shape[2])))
    return torch.cat(crops, dim=3)
