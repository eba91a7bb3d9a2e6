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


class Gathering:
    """A row of numbers of every rank that is on its way: begun by all ranks, read when it is needed.

    On a GPU it is enqueued behind what the device has to do, and copied to pinned memory: nobody waits for it until it
    is read, and then only for what was enqueued before it.
    """

    def __init__(self, names: list[str], mine: Tensor) -> None:
        self._names = names
        gathered = mine.new_empty(dist.get_world_size() * len(mine))
        self._work = dist.all_gather_into_tensor(gathered, mine, async_op=True)
        self._there: torch.cuda.Event | None = None
        if mine.is_cuda:
            self._work.wait()  # of the stream, not of the host
            self._told = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
            self._told.copy_(gathered, non_blocking=True)
            self._there = torch.cuda.current_stream().record_event()
        else:
            self._told = gathered

    def read(self) -> GatheredScalars:
        """The numbers, once they are here."""
        if self._there is None:
            self._work.wait()
        else:
            self._there.synchronize()
        columns = self._told.view(-1, len(self._names)).T.tolist()
        return GatheredScalars(dict(zip(self._names, columns, strict=True)))


def begin_all_gather_scalars(values: Mapping[str, Tensor | float], device: torch.device) -> Gathering:
    """Begin to gather each rank's `values`: scalars under the same names, in the same order, on all ranks; those that
    are tensors are taken for fp32. Collective."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: float(value) for name, value in values.items() if not isinstance(value, Tensor)}
    row = torch.tensor([*numbers.values()], dtype=torch.float64, pin_memory=device.type == "cuda")
    parts = [row.to(device, non_blocking=True)]
    if tensors:
        parts.append(torch.stack([value.detach().float().to(device) for value in tensors.values()]).double())
    return Gathering([*numbers, *tensors], torch.cat(parts))


def all_gather_scalars(values: Mapping[str, Tensor | float], device: torch.device) -> GatheredScalars:
    """Gather each rank's `values`, and wait for them; see `begin_all_gather_scalars`. Collective."""
    return begin_all_gather_scalars(values, device).read()


def gathered_rows(rows: Tensor) -> Tensor:
    """Rows (n, ...) of each rank, equally many, as (ranks * n, ...) in the order of ranks; without a gradient.
    Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows.detach()
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.detach().contiguous())
    return gathered


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
