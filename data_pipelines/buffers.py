"""The memory that batches are made in: tensors for the consumer, the same bytes as arrays for those who fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from data_pipelines.layout import Field
from data_pipelines.packed_batch import packed

#: A micro-batch of b rows by name. Always there: `global_crops` (b, v, c, H, W), crops being uint8, or uint16 for 16
#: bits; `ids` (b, 2) int64, data set and sample shown; `rows` (b,) int64, positions in the global batch; `labels` (b,)
#: int64, -1 where unknown. Where the recipe has them: `local_crops` (b, u, c, h, w), `target_crops` (b, c, h, w),
#: `teacher_crops` (b, v, c, h, w), and `global_colours` and `teacher_colours` (b, v, p) and `local_colours` (b, u, p)
#: float32, see `device.finish`. Beside these what the method
#: asked for (b, ...), masks for example, and what it notes itself. Crops of their own shape are in `global_patches` and
#: others in their place, see `packed_batch.packed`.
Batch = dict[str, Tensor]


def map_batch(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `change` applied to each tensor."""
    return {name: change(part) for name, part in batch.items()}


class StepBuffer:
    """One rank's part of one step; used again for a later step.

    Args:
        arrays: Each field of the rows (n, ...), memory that others may fill as well.
        rows: Positions in the global batch.
        pinned: Whether the memory is page-locked, so that a GPU copies from it asynchronously.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], rows: range, pinned: bool) -> None:
        self.arrays = dict(arrays)
        self.arrays["rows"][:] = rows
        self._tensors: Batch = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        self._num_rows, self._pinned = len(rows), pinned
        self._copied: torch.cuda.Event | None = None

    @classmethod
    def allocate(cls, fields: Mapping[str, Field], rows: range, pin_memory: bool) -> StepBuffer:
        """Memory of its own for these rows."""
        tensors = {
            name: torch.empty((len(rows), *field.shape), dtype=_torch_type(field.dtype), pin_memory=pin_memory)
            for name, field in fields.items()
        }
        buffer = cls({name: tensor.numpy() for name, tensor in tensors.items()}, rows, pin_memory)
        buffer._tensors = tensors  # a tensor of pinned memory knows that it is
        return buffer

    def split(self, parts: int) -> list[Batch]:
        """The rows as `parts` consecutive micro-batches, which share this buffer's memory."""
        length = self._num_rows // parts
        return [self._rows(slice(first, first + length)) for first in range(0, self._num_rows, length)]

    def _rows(self, rows: slice) -> Batch:
        batch = map_batch(self._tensors, lambda tensor: tensor[rows])
        return packed(batch, self._pinned) if "global_patches" in batch else batch

    def release(self) -> None:
        """Mark the end of use, but for copies that the GPU's current stream has yet to make."""
        if self._pinned and torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_free(self) -> bool:
        """Whether those copies are made."""
        return self._copied is None or self._copied.query()

    def wait_until_free(self) -> None:
        """Return once those copies are made."""
        if self._copied is not None:
            self._copied.synchronize()


def _torch_type(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
