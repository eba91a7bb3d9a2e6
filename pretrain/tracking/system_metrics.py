"""How the machines of a run do: every node, not rank 0's alone.

Each rank samples in a thread, since a file system that hangs must not stall a step. When metrics are logged, all ranks
tell each other the last samples in one small collective, and rank 0 writes them down.
"""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.config import Config
from pretrain.tracking.machine import NAMES, RANK, Machine, node_name

NAME_BYTES = 48
OLD_SECONDS = 60.0  # beyond the interval: a sample of a thread that hangs says nothing of the present


class SystemMetrics:
    """The samples of all ranks, by node."""

    def __init__(self, run: Path, config: Config, device: torch.device) -> None:
        """Start to sample every `tracking.system_every_seconds`; 0 is never. Collective."""
        self.device, self.every_seconds = device, config.tracking.system_every_seconds
        self._logged = -math.inf
        self._latest: tuple[float, list[float]] | None = None
        self._ended = threading.Event()
        if not self.every_seconds:
            return
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._nodes = _node_of_each_rank(device)
        gpu = (device.index or 0) if device.type == "cuda" else None
        cache = Path(config.data.cache.dir or os.environ.get("SELFSIGHT_CACHE") or "~/.cache/selfsight").expanduser()
        self._machine = Machine(run, cache, local_rank == 0, gpu)
        self._thread = threading.Thread(target=self._sample, name="system metrics", daemon=True)
        self._thread.start()

    def gather(self) -> dict[str, float]:
        """`system/NODE/NAME` of all nodes, and `system/NODE/gpuN/NAME` of their GPUs, the last samples; collective.

        Empty where it is not yet time for new ones; only rank 0 may use what is returned.
        """
        if not self.every_seconds:
            return {}
        mine = torch.full((len(NAMES),), math.nan, dtype=torch.float64)
        if self._latest is not None and time.monotonic() - self._latest[0] < self.every_seconds + OLD_SECONDS:
            mine = torch.tensor(self._latest[1], dtype=torch.float64)
        gathered = torch.empty(dist.get_world_size() * len(NAMES), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(gathered, mine.to(self.device))
        if time.monotonic() - self._logged < self.every_seconds:
            return {}
        values = by_node(self._nodes, gathered.view(-1, len(NAMES)).tolist())
        if values:
            self._logged = time.monotonic()
        return values

    def close(self) -> None:
        """End the thread, or leave it behind if it hangs."""
        self._ended.set()

    def _sample(self) -> None:
        while True:
            self._latest = time.monotonic(), self._machine.sample()
            if self._ended.wait(self.every_seconds):
                return


def by_node(nodes: list[str], rows: list[list[float]]) -> dict[str, float]:
    """The numbers of all ranks under the names of their nodes; what nobody knows is left out."""
    values: dict[str, float] = {}
    ranks_of: dict[str, int] = {}
    for node, row in zip(nodes, rows, strict=True):
        number = ranks_of[node] = ranks_of.get(node, -1) + 1
        for name, value in zip(NAMES, row, strict=True):
            if math.isnan(value):
                continue
            key = f"system/{node}/{name.replace('gpu/', f'gpu{number}/')}"
            values[key] = values.get(key, 0.0) + value if name in RANK else value
    return values


def _node_of_each_rank(device: torch.device) -> list[str]:
    """Every rank's node, by rank. Collective."""
    name = node_name().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
    mine = torch.tensor(list(name), dtype=torch.uint8, device=device)
    gathered = torch.empty(dist.get_world_size() * NAME_BYTES, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(gathered, mine)
    return [bytes(row).rstrip(b"\0").decode() for row in gathered.view(-1, NAME_BYTES).tolist()]
