"""What happens to a batch between the loader and the method: to the device, counted, and proven to be the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.loader import Batch, Loader
from data_pipelines.packed_batch import LENGTHS
from data_pipelines.rng import Purpose, stream_key
from data_pipelines.transforms.backends.device import finish
from pretrain.stream.hidden import note_hidden

#: What only the host reads stays there.
ON_THE_HOST = ("ids", "rows", *LENGTHS)


class Step(NamedTuple):
    """This rank's part of a step, on the device; it holds until the next is asked for."""

    micro_batches: list[Batch]
    digest: int  # of the ids, see `ids_digest`


class SideStream:
    """A CUDA stream beside the one that computes: what is enqueued inside of `with` runs while that one is busy."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._entered = torch.cuda.stream(self._stream)
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._entered.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._done = self._stream.record_event()
        self._entered.__exit__(*exception)

    def hand_over(self, micro_batches: list[Batch]) -> None:
        """Have the computing stream wait for what was enqueued last, and own the tensors from there."""
        computing = torch.cuda.current_stream()
        if self._done is not None:
            computing.wait_event(self._done)
        for part in (part for batch in micro_batches for part in batch.values() if part.is_cuda):
            part.record_stream(computing)


class DeviceSteps(Iterator[Step]):
    """A loader's steps on the device, without end.

    On a GPU, a step that the loader has ready is copied, and its colours finished where they are left to the device,
    while the one before it is computed. On the CPU batches pass through.

    Args:
        loader: Where they come from.
        start: The first step.
        device: Where to.
        side: Enqueues the copies; default: a stream of the device, None on the CPU.
    """

    def __init__(self, loader: Loader, start: int, device: torch.device, side: SideStream | None = None) -> None:
        self._loader, self._device = loader, device
        self._loaded = loader.steps(start)
        self._side = SideStream(device) if side is None and device.type == "cuda" else side
        self._ahead: Step | None = None

    def __next__(self) -> Step:
        if self._side is None:
            return self._copy()
        step = self._ahead or self._copy_aside(self._side)
        self._side.hand_over(step.micro_batches)
        # only what is there: waiting for the loader now would keep the device from this step
        self._ahead = self._copy_aside(self._side) if self._loader.ready else None
        return step

    def _copy_aside(self, side: SideStream) -> Step:
        with side:  # asking for the next item, too: the loader reuses the memory of the last after this stream's copies
            return self._copy()

    def _copy(self) -> Step:
        loaded = next(self._loaded)
        return Step([to_device(batch, self._device) for batch in loaded], sum(ids_digest(batch) for batch in loaded))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on the device, but for ids and rows, with finished colours and `note_hidden`'s numbers.

    Copies from pinned memory overlap with computation.
    """
    batch = note_hidden(batch)
    if device.type == "cpu":
        moved = batch
    else:  # of what stays, a copy: the loader's memory is used again while this step is still computed
        moved = {
            name: part.clone() if name in ON_THE_HOST else part.to(device, non_blocking=True)
            for name, part in batch.items()
        }
    return finish(moved, batch) if "global_colours" in batch else moved


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Seed torch's generators for what draws from them within models of timm or of others, so that a resumed run draws
    what an uninterrupted one would. (Drop path of our own encoders is a function of the row: encoders/drop_path.py.)"""
    torch.manual_seed(stream_key(seed, Purpose.DROP_PATH, step, rank, micro_batch))


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
    if "local_crops" in batch:
        height = crops[0].shape[2]
        for view in range(batch["local_crops"].shape[1]):
            small = show(batch["local_crops"][:, view])
            crops.append(torch.nn.functional.pad(small, (0, 0, 0, height - small.shape[2])))
    return torch.cat(crops, dim=3)
