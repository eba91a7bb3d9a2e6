"""A rank's piece of a checkpoint: a safetensors file of flat slices of named tensors, and reading any slice of them.

A key is `KIND/NAME@OFFSET`: the elements of tensor NAME from OFFSET on, in the order of its flattened whole. KIND is
`value`, or one of AdamW's moments `exp_avg` and `exp_avg_sq`. The header's metadata says, as JSON, the whole `shapes`
of the tensors and the optimizer `steps` that the moments have taken.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipelines.files import parse_json
from pretrain.checkpoints.folder import Written

VALUE, MOMENTS = "value", ("exp_avg", "exp_avg_sq")
_CHUNK = 2**24  # bytes
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Elements of a named tensor, from `offset` on in its flattened whole, and where they lie in this process.

    tensor: holds them from `start` on, in its own flattened order.
    replicated: every rank holds the same.
    """

    kind: str
    name: str
    shape: tuple[int, ...]  # of the whole
    offset: int
    numel: int
    tensor: Tensor
    start: int = 0
    replicated: bool = False
    steps: float | None = None  # of the moments, that the optimizer has taken
    twin: bool = False  # an earlier rank holds the same, and writes it

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}@{self.offset}"

    def read(self) -> Tensor:
        """The elements, flat; a view where the tensor is contiguous."""
        return self.tensor.detach().reshape(-1).narrow(0, self.start, self.numel)

    def write(self, values: Tensor) -> None:
        """Put flat `values` in their place."""
        tensor = self.tensor.detach()
        if tensor.is_contiguous():
            tensor.view(-1).narrow(0, self.start, self.numel).copy_(values)
        else:
            assert self.numel == tensor.numel()
            tensor.copy_(values.view(tensor.shape))


class HostCopy:
    """Parts copied to memory of this process' own, laid out as the data of their file; reused from copy to copy.

    It is as large as the file: at most 12 bytes for each parameter (its value and two moments, fp32) and 4 for each
    frozen one, divided by the number of ranks. For a GPU the memory is pinned, of which torch takes a power of two.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self._used = 0

    def take(self, parts: Iterable[Part], device: torch.device) -> None:
        """Copy the parts as they are now; returns when the copy is complete."""
        ordered = sorted(parts, key=lambda part: -part.tensor.element_size())  # so that each lies at its alignment
        header, self._used = _layout(ordered)
        self._header = header
        if len(self._memory) < self._used:
            self._memory = torch.empty(self._used, dtype=torch.uint8, pin_memory=device.type == "cuda")
        begin = 0
        for part in ordered:
            end = begin + part.numel * part.tensor.element_size()
            place = self._memory[begin:end].view(part.tensor.dtype)
            place.copy_(part.read(), non_blocking=True)
            begin = end
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def write(self, path: Path) -> Written:
        """Write the copy as a safetensors file; on the disk when this returns."""
        digest, data = hashlib.sha256(self._header), memoryview(self._memory.numpy())[: self._used]
        with path.open("wb") as file:
            file.write(self._header)
            for begin in range(0, self._used, _CHUNK):
                chunk = data[begin : begin + _CHUNK]
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        return Written(len(self._header) + self._used, digest.hexdigest())


def _layout(parts: list[Part]) -> tuple[bytes, int]:
    """The header of a safetensors file that holds the parts in this order, and the bytes of its data."""
    steps = {part.name: part.steps for part in parts if part.steps is not None}
    metadata = {"shapes": {part.name: part.shape for part in parts}, "steps": steps}
    header: dict[str, object] = {"__metadata__": {key: json.dumps(value) for key, value in metadata.items()}}
    begin = 0
    for part in parts:
        end = begin + part.numel * part.tensor.element_size()
        assert part.key not in header, part.key
        header[part.key] = {
            "dtype": _DTYPES[part.tensor.dtype], "shape": [part.numel], "data_offsets": [begin, end]
        }  # fmt: skip
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begin


class Pieces:
    """The pieces of a checkpoint, open to be read; only what is asked for is read.

    Raises ValueError where they do not fit together, which no checkpoint does that is whole.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, float] = {}
        self._stack = ExitStack()
        self._slices: dict[tuple[str, str], list[tuple[int, int, object, str]]] = defaultdict(list)
        for path in sorted(files):
            file = self._stack.enter_context(safe_open(path, "pt"))
            metadata: Mapping[str, str] = file.metadata() or {}
            self.shapes |= {name: tuple(shape) for name, shape in parse_json(metadata["shapes"]).items()}
            self.steps |= parse_json(metadata["steps"])
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                kind, _, rest = key.partition("/")
                name, _, offset = rest.rpartition("@")
                numel = file.get_slice(key).get_shape()[0]
                self._slices[kind, name].append((int(offset), numel, file, key))
        for slices in self._slices.values():
            slices.sort(key=lambda found: found[0])

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a tensor: a parameter that never had a gradient has no moments."""
        return (kind, name) in self._slices

    def read(self, kind: str, name: str, offset: int, numel: int) -> Tensor:
        """Elements of a tensor's flattened whole, from `offset` on: (numel) on the CPU."""
        found, at = [], offset
        for begin, length, file, key in self._slices[kind, name]:
            if begin <= at < min(begin + length, offset + numel):
                end = min(begin + length, offset + numel)
                found.append(file.get_slice(key)[at - begin : end - begin])  # type: ignore[attr-defined]
                at = end
        if at < offset + numel:
            raise ValueError(f"the pieces hold {kind} of {name} to element {at} only, not to {offset + numel}")
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self, name: str) -> Tensor:
        """The value of a tensor in its shape, on the CPU."""
        shape = self.shapes[name]
        return self.read(VALUE, name, 0, math.prod(shape)).view(shape)
