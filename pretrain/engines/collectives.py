"""What all ranks tell each other in a step: one small collective, whatever is asked; and longer things, seldom."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GatheredScalars:
    """Named numbers of every rank: `by_rank` (world_size values each) is the same on all of them."""

    by_rank: Mapping[str, list[float]]

    def mean(self, name: str) -> float:
        return sum(self.by_rank[name]) / len(self.by_rank[name])

    def total(self, name: str) -> float:
        return sum(self.by_rank[name])

    def lowest(self, name: str) -> float:
        return min(self.by_rank[name])

    def any(self, name: str) -> bool:
        return any(self.by_rank[name])


def all_gather_scalars(values: Mapping[str, Tensor | float], device: torch.device) -> GatheredScalars:
    """Gather each rank's `values`: scalars under the same names, in the same order, on all ranks. Collective."""
    there = {name for name, value in values.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
    here = torch.tensor([float(values[name]) for name in values if name not in there], dtype=torch.float64)
    parts = [here.to(device)]  # one copy for all that is not on the device yet
    if there:
        parts.append(
            torch.stack([torch.as_tensor(values[name], dtype=torch.float64) for name in values if name in there])
        )
    mine = torch.cat(parts)
    gathered = mine.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_into_tensor(gathered, mine)
    columns = gathered.view(-1, len(mine)).T.tolist()
    names = sorted(values, key=lambda name: name in there)
    return GatheredScalars(dict(zip(names, columns, strict=True)))


def all_gather_objects(value: Any, device: torch.device) -> list[Any]:
    """Every rank's JSON value, on all ranks. Collective, in two steps: for what is seldom told."""
    text = json.dumps(value).encode()
    lengths = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(text)], device=device))
    longest = int(lengths.max())
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    gathered = mine.new_empty(len(lengths) * longest)
    dist.all_gather_into_tensor(gathered, mine)
    rows = gathered.view(-1, longest).cpu().numpy()
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths.tolist(), strict=True)]
