"""A forward pass traced on a GPU that is not there, to see that nothing in it waits for the device.

FakeTensorMode knows shapes and devices and computes nothing, so it raises where a value would be asked for: `.item()`,
`if tensor:`, `nonzero`, boolean indexing. `NoCopies` raises where a tensor would go from one device to another.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pretrain.encoders import tables
from pretrain.stream import from_host

CUDA = torch.device("cuda:0")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._copy_from, torch.ops.aten._local_scalar_dense)


class WaitError(AssertionError):
    """The forward pass would wait for the device, or have it wait."""


class NoCopies(TorchDispatchMode):
    """While it is entered, a copy from one device to another raises WaitError.

    Allowed are numbers of the program, which travel with the launch of a kernel, `from_host`, whose copies nobody
    waits for, and `tables.built_once`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in COPIES:
            devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if kwargs.get("device") is not None:
                devices.add(torch.device(kwargs["device"]))
            apart = len({device.type for device in devices}) > 1
            if apart and not _asked_by(tables) and not _asked_by(from_host):
                raise WaitError(f"{func} between {' and '.join(sorted(map(str, devices)))}")
        return func(*args, **kwargs)


def _asked_by(module: ModuleType) -> bool:
    """Whether a module's function asks; `tables.built_once` has kept none of its tables for fake tensors."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename != module.__file__:
        frame = frame.f_back
    return frame is not None


def trace_on_fake_gpu(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    """`module(*inputs, **named)` with module and inputs on a fake GPU: its output, of fake tensors.

    Args:
        module: Built on the CPU; it is copied and stays as it is.
        inputs, named: Any structure of lists, tuples and dictionaries; its tensors go to the GPU but those that are
            wrapped in `OnHost`. Of dataclasses, such as `Mask`, the fields are brought there.

    It runs twice: what a module builds in its first forward pass and keeps does not count.

    Raises WaitError.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    module = copy.deepcopy(module)

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach().to("meta"), CUDA)

    def brought(value: Any) -> Any:
        if isinstance(value, OnHost):
            return mode.from_tensor(value.tensor)
        if dataclasses.is_dataclass(value):
            fields = {field.name: brought(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return fake(value) if isinstance(value, Tensor) else value

    swap_tensors(module, fake)
    inputs, named = tree_map(brought, (inputs, named))
    try:
        with mode:
            module(*inputs, **named)
            with NoCopies():
                return module(*inputs, **named)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise WaitError(f"{error} waits for the device") from error


class OnHost:
    """A tensor that stays on the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def swap_tensors(module: nn.Module, make: Any) -> None:
    """Put `make(tensor)` in the place of every parameter and buffer, one for each even where it has several names."""
    made: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor)
        return made[id(tensor)]

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(of(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = of(buffer)
