"""The memory that batches are made in: tensors for the consumer, the same bytes as arrays for the threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from data_pipelines.transforms.config import Views

Shape = tuple[int, ...]


#: A micro-batch of b rows by name. Always there: `global_crops` (b, v, c, H, W), crops being uint8, or uint16 for 16
#: bits; `ids` (b, 2) int64, data set and sample shown; `rows` (b,) int64, positions in the global batch; `labels` (b,)
#: int64, -1 where unknown. Where the recipe has them: `local_crops` (b, u, c, h, w), `target_crops` (b, c, h, w), and
#: `global_colours` (b, v, p) and `local_colours` (b, u, p) float32, see `device.finish`. Beside these what the method
#: asked for (b, ...), masks for example, and what it notes itself.
Batch = dict[str, Tensor]


def map_batch(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `change` applied to each tensor."""
    return {name: change(part) for name, part in batch.items()}


class StepBuffer:
    """One rank's part of one step; used again for a later step.

    Args:
        views: The crops.
        channels: Of every crop.
        rows: Positions in the global batch.
        fields: What is drawn of a row beside its crops, for names, shapes and types.
        pin_memory: Page-locked, so that a GPU copies from it asynchronously.
        num_colours: Numbers for each crop whose colours are left to the device; 0 where none are.
        bits: Of a channel, 8 or 16.
    """

    def __init__(
        self,
        views: Views,
        channels: int,
        rows: range,
        fields: Mapping[str, np.ndarray],
        pin_memory: bool,
        num_colours: int = 0,
        bits: int = 8,
    ) -> None:
        pixel = torch.uint16 if bits == 16 else torch.uint8

        def allocate(shape: Shape, dtype: torch.dtype = pixel) -> Tensor:
            return torch.empty((len(rows), *shape), dtype=dtype, pin_memory=pin_memory)

        local, target = views.local_crops, views.target_crop
        self._tensors: Batch = {
            "global_crops": allocate((len(views.global_crops), channels, *views.global_size)),
            "labels": allocate((), torch.int64),
            "ids": allocate((2,), torch.int64),
            "rows": torch.arange(rows.start, rows.stop),
        }
        if local is not None:
            self._tensors["local_crops"] = allocate((local.count, channels, *local.size))
        if target is not None:
            self._tensors["target_crops"] = allocate((channels, *target.size))
        for name, field in fields.items():
            if name in self._tensors:
                raise ValueError(f"a method asks for a field {name!r}, which every batch has; name it otherwise")
            self._tensors[name] = allocate(field.shape, torch.from_numpy(field).dtype)
        if num_colours:
            self._tensors["global_colours"] = allocate((len(views.global_crops), num_colours), torch.float32)
            if local is not None:
                self._tensors["local_colours"] = allocate((local.count, num_colours), torch.float32)
        #: The tensors' memory, under their names.
        self.arrays: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in self._tensors.items()}
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
