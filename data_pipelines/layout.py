"""What a step's batch holds, and where each field lies in a run of bytes (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from mmap import mmap
from typing import NamedTuple

import numpy as np

from data_pipelines.transforms.config import Views

#: The fields that are pixels, (..., channels, height, width).
CROPS = ("global_crops", "local_crops", "target_crops", "teacher_crops")
_ALIGNMENT = 64  # bytes
_PAGE = 4096  # bytes; a buffer begins at one, so that buffers share none


class Field(NamedTuple):
    """Of one row."""

    shape: tuple[int, ...]
    dtype: np.dtype


def fields_of(
    views: Views, channels: int, bits: int, drawn: Mapping[str, np.ndarray], num_colours: int = 0, masks: bool = False
) -> dict[str, Field]:
    """The fields of a batch by name, see `buffers.Batch`.

    Args:
        views: The crops.
        channels: Of every crop, those of all frames of a stack together.
        bits: Of a channel, 8 or 16.
        drawn: What is drawn of a row beside its crops, for names, shapes and types.
        num_colours: Numbers for each crop whose colours are left to the device; 0 where none are.
        masks: Whether the masks of the first global crops are in it.

    Raises:
        ValueError: A drawn field has the name of one that every batch has.
    """
    pixel, whole, number = np.dtype(np.uint16 if bits == 16 else np.uint8), np.dtype(np.int64), np.dtype(np.float32)
    local, target, num_global = views.local_crops, views.target_crop, len(views.global_crops)
    crops = {} if views.native else {"global_crops": Field((num_global, channels, *views.global_size), pixel)}
    fields = {
        **crops,
        "labels": Field((), whole),
        "ids": Field((2,), whole),
        "rows": Field((), whole),
    }
    if views.native:
        for kind, count, crop in (
            ("global", num_global, views.global_crops[0]),
            ("local", local and local.count, local),
        ):
            if crop is not None and count:
                assert crop.max_tokens is not None
                assert crop.patch is not None
                fields[f"{kind}_patches"] = Field((count, crop.max_tokens, crop.patch**2 * channels), pixel)
                fields[f"{kind}_grids"] = Field((count, 2), whole)
    elif local is not None:
        fields["local_crops"] = Field((local.count, channels, *local.size), pixel)
    if target is not None:
        fields["target_crops"] = Field((channels, *target.size), pixel)
    teacher = views.teacher_crops
    if teacher is not None:
        fields["teacher_crops"] = Field((num_global, channels, *teacher.size), pixel)
    if masks:
        fields["masks"] = Field(views.global_size, np.dtype(np.int32))
    for name, field in drawn.items():
        if name in fields:
            raise ValueError(f"a method asks for a field {name!r}, which every batch has; name it otherwise")
        fields[name] = Field(field.shape, field.dtype)
    if num_colours:
        fields["global_colours"] = Field((num_global, num_colours), number)
        if local is not None:
            fields["local_colours"] = Field((local.count, num_colours), number)
        if teacher is not None and teacher.colours:
            fields["teacher_colours"] = Field((num_global, num_colours), number)
    return fields


class Layout:
    """Where the fields of `num_rows` rows lie in a buffer of `num_bytes`, one field after the other."""

    def __init__(self, fields: Mapping[str, Field], num_rows: int) -> None:
        self._places: list[tuple[str, Field, int]] = []
        self._num_rows, position = num_rows, 0
        for name, field in fields.items():
            self._places.append((name, field, position))
            size = num_rows * int(np.prod(field.shape, dtype=np.int64)) * field.dtype.itemsize
            position += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = max(_PAGE, -(-position // _PAGE) * _PAGE)

    def arrays(self, memory: mmap, number: int) -> dict[str, np.ndarray]:
        """The fields of buffer `number` of those that lie in `memory` one after the other, as views of it."""
        begin, rows = number * self.num_bytes, self._num_rows
        return {
            name: np.ndarray((rows, *field.shape), field.dtype, memory, begin + offset)
            for name, field, offset in self._places
        }
