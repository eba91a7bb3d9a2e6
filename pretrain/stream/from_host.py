"""Numbers that the host knows, and such on their way to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def from_host(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device, to which they are copied from page-locked memory: nothing waits for it."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_host(numbers: Tensor) -> np.ndarray:
    """Of what a batch keeps on the host."""
    return numbers.numpy()
