"""The router: what every expert is worth to a token, and the noise on it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LARGEST_SCALE = 100.0


class LinearGate(nn.Module):
    """A linear layer without bias."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(dim, num_experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., d) to logits (..., experts), in fp32 whatever the run's precision."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.wg.weight.float())


class CosineGate(nn.Module):
    """The cosine of a projected token and of each expert's embedding, over a learned temperature (Chi et al. 2022)."""

    def __init__(self, dim: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((1,), math.log(1 / 0.5)))
        self.cosine_projector = nn.Linear(dim, width)
        self.sim_matrix = nn.Parameter(torch.empty(width, num_experts))
        nn.init.normal_(self.sim_matrix, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """As `LinearGate`."""
        with torch.autocast(tokens.device.type, enabled=False):
            projector = self.cosine_projector
            projected = F.normalize(F.linear(tokens.float(), projector.weight.float(), projector.bias.float()), dim=-1)
            scale = self.temperature.float().clamp(max=math.log(_LARGEST_SCALE)).exp()
            return projected @ F.normalize(self.sim_matrix.float(), dim=0) * scale


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_GAMMA, _MIX1, _MIX2 = (_signed(w) for w in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def bits_of(keys: Tensor, first: int, count: int) -> Tensor:
    """The numbers from `first` on of the streams `keys` (n,) int64, on the device: (n, count) int64 with the 64 bits
    that `data_pipelines.rng.bits_at` gives."""
    places = torch.arange(first + 1, first + 1 + count, device=keys.device)
    words = keys[:, None] + places * _GAMMA  # int64 wraps, which is arithmetic modulo 2^64
    words = (words ^ _shifted(words, 30)) * _MIX1
    words = (words ^ _shifted(words, 27)) * _MIX2
    return words ^ _shifted(words, 31)


def normals(keys: Tensor, first: int, shape: tuple[int, int]) -> Tensor:
    """Standard normal numbers (n, *shape) fp32: those from `first` on of each stream."""
    bits = bits_of(keys, first, shape[0] * shape[1])
    uniform = (_shifted(bits, 40).float() + 0.5) * 2.0**-24  # never 0 nor 1
    return (2 * uniform - 1).erfinv().mul(math.sqrt(2)).view(len(keys), *shape)


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in, which int64 does not do by itself."""
    return (words >> by) & ((1 << (64 - by)) - 1)
