"""How long each rank computes by itself, so that the slow one among those that wait for it can be named."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn


class ForwardClock:
    """Seconds of a module's forward passes: without the exchange of gradients, in which all ranks wait for the last.

    On a GPU by events that are read when the device has long passed them: nothing waits for it. Under ZeRO 3 the
    forward pass fetches weights from the other ranks, and tells less.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: list[float | torch.cuda.Event] = []
        self._ended: list[float | torch.cuda.Event] = []
        module.register_forward_pre_hook(lambda *_: self._began.append(self._now()))
        module.register_forward_hook(lambda *_: self._ended.append(self._now()))

    def read(self) -> float:
        """Seconds of the passes since the last call, as far as they are over."""
        total = 0.0
        while self._ended and (not self._on_gpu or self._ended[0].query()):
            began, ended = self._began.pop(0), self._ended.pop(0)
            total += began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began
        return total

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class SlowestRank:
    """Which rank computes longest, between two log lines."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self._seconds = [0.0] * len(hosts)

    def add(self, seconds: Sequence[float]) -> None:
        """What `ForwardClock.read` gave on each rank."""
        self._seconds = [total + one for total, one in zip(self._seconds, seconds, strict=True)]

    def named(self, factor: float = 1.5) -> str:
        """In words, if it takes `factor` times the median of the ranks; else nothing. Counting begins anew."""
        seconds, self._seconds = self._seconds, [0.0] * len(self.hosts)
        usual, longest = median(seconds), max(seconds)
        if len(seconds) < 2 or longest < factor * max(usual, 1e-9):
            return ""
        rank = seconds.index(longest)
        return f" Rank {rank} on {self.hosts[rank]} computes {longest / max(usual, 1e-9):.1f} times the ranks' median."
