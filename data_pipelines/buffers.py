"""The memory that batches are made in: tensors for the consumer, the same bytes as arrays for the threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from data_pipelines.transforms.config import Views

Shape = tuple[int, ...]


class Batch(TypedDict):
    """A micro-batch of b rows; crops are uint8, or uint16 for 16 bits. None: the recipe has no such part."""

    global_crops: Tensor  # (b, v, c, H, W)
    local_crops: Tensor | None  # (b, u, c, h, w)
    target_crops: Tensor | None  # (b, c, h, w), the tokenizer's view
    drop_mask: Tensor | None  # (b, gh, gw) bool
    token_mask: Tensor | None  # (b, gh, gw) bool
    labels: Tensor | None  # (b,) int64, -1 where unknown
    ids: Tensor  # (b, 2) int64: data set, sample shown
    rows: Tensor  # (b,) int64, position in the global batch
    global_colours: NotRequired[Tensor]  # (b, v, p) float32: colours left to the device, see `device.finish`
    local_colours: NotRequired[Tensor]  # (b, u, p)
    mean_hidden: NotRequired[Tensor]  # () replaced units per micro-batch of the global batch; set by the trainer


def map_batch(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `change` applied to each tensor."""
    parts = {name: change(part) if isinstance(part, Tensor) else None for name, part in batch.items()}
    return cast("Batch", parts)


class StepBuffer:
    """One rank's part of one step; used again for a later step.

    Args:
        views: The crops.
        channels: Of every crop.
        rows: Positions in the global batch.
        mask_shapes: (gh, gw) of the dropped and of the replaced units, None for what is not drawn.
        pin_memory: Page-locked, so that a GPU copies from it asynchronously.
        num_colours: Numbers for each crop whose colours are left to the device; 0 where none are.
        bits: Of a channel, 8 or 16.
    """

    def __init__(
        self,
        views: Views,
        channels: int,
        rows: range,
        mask_shapes: tuple[Shape | None, Shape | None],
        pin_memory: bool,
        num_colours: int = 0,
        bits: int = 8,
    ) -> None:
        pixel = torch.uint16 if bits == 16 else torch.uint8

        def allocate(shape: Shape, dtype: torch.dtype = pixel) -> Tensor:
            return torch.empty((len(rows), *shape), dtype=dtype, pin_memory=pin_memory)

        local, target = views.local_crops, views.target_crop
        dropped, replaced = mask_shapes
        self._tensors = Batch(
            global_crops=allocate((len(views.global_crops), channels, *views.global_size)),
            local_crops=None if local is None else allocate((local.count, channels, *local.size)),
            target_crops=None if target is None else allocate((channels, *target.size)),
            drop_mask=None if dropped is None else allocate(dropped, torch.bool),
            token_mask=None if replaced is None else allocate(replaced, torch.bool),
            labels=allocate((), torch.int64),
            ids=allocate((2,), torch.int64),
            rows=torch.arange(rows.start, rows.stop),
        )
        if num_colours:
            self._tensors["global_colours"] = allocate((len(views.global_crops), num_colours), torch.float32)
            if local is not None:
                self._tensors["local_colours"] = allocate((local.count, num_colours), torch.float32)
        #: The tensors' memory, under their names.
        self.arrays: dict[str, np.ndarray] = {
            name: tensor.numpy() for name, tensor in self._tensors.items() if isinstance(tensor, Tensor)
        }
        self._num_rows, self._pin_memory = len(rows), pin_memory
        self._copied: torch.cuda.Event | None = None

    def split(self, parts: int) -> list[Batch]:
        """The rows as `parts` consecutive micro-batches, which share this buffer's memory."""
        length = self._num_rows // parts
        return [self._rows(slice(first, first + length)) for first in range(0, self._num_rows, length)]

    def _rows(self, rows: slice) -> Batch:
        return map_batch(self._tensors, lambda tensor: tensor[rows])

    def release(self) -> None:
        """Mark the end of use, but for copies that the GPU's current stream has yet to make."""
        if self._pin_memory and torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait_until_free(self) -> None:
        """Return once those copies are made."""
        if self._copied is not None:
            self._copied.synchronize()
