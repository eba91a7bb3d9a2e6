"""Tables that depend on sizes alone, built once for each device and kept: indices of relative positions, masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def built_once(build: Callable[P, Tensor], most: int = 64) -> Callable[P, Tensor]:
    """`build`, whose tables are kept, the `most` asked for last.

    Its arguments are hashable, name the device and decide the table, which nobody changes. The tables belong to no
    module, so they are in no state dict and in no copy; compiled code holds them as constants. While tensors are
    fake (tracing, shape inference) each call builds its own, and none is kept.
    """

    @lru_cache(maxsize=most)
    def kept(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # what is built under inference may never meet a gradient
            return build(*args, **kwargs)

    @wraps(build)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return build(*args, **kwargs)
        return kept(*args, **kwargs)

    return torch.compiler.assume_constant_result(table)
