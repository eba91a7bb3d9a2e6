"""A network that is used but not trained: a teacher of another run, a tokenizer."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def checksum(network: nn.Module) -> str:
    """SHA-256 of a network's weights on the CPU, and of their names."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Frozen:
    """A network kept beside a module, not in it: fp32, in evaluation mode, and in no optimizer, checkpoint or ZeRO
    partition. It comes from a file that stays where it is, so a checkpoint need not hold it again. Its arithmetic is at
    the run's precision; what it decides, such as the nearest code, it computes in fp32 by itself."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self._device = torch.device("cpu")

    def __call__(self, inputs: Tensor) -> Any:
        """What the network makes of `inputs`, on their device, without gradients; under the caller's autocast."""
        if inputs.device != self._device:
            self.network.to(inputs.device)
            self._device = inputs.device
        with torch.no_grad():
            return self.network(inputs)

    def blocks(self) -> list[nn.Module]:
        """What of it is compiled: what it says itself."""
        named = getattr(self.network, "blocks", None)
        return list(named()) if callable(named) else []
