"""At which precision products are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.config import EngineConfig


def allow_fast_products(device: torch.device) -> None:
    """On a GPU, let products of fp32 matrices round their factors to 11 bits (TF32), several times as fast.

    What a decision hangs on is computed `exactly` all the same.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """In here products are of fp32 factors, under autocast and `allow_fast_products` too; those of convolutions, which
    torch rounds unless it is told not to, are as well."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def slow_precision(config: EngineConfig, device: torch.device) -> str | None:
    """A line where the run's precision is one that this CPU has no instructions for, else None."""
    if device.type != "cpu" or config.precision != "bf16" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "warning: engine.precision is bf16, for which this CPU has no instructions: products take several times as "
        "long as in fp32; set engine.precision=fp32"
    )
