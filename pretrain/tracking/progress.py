"""How fast a run goes, and the line that says so."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from data_pipelines.loader import Loader


@dataclass
class Window:
    """Speed since the last log line, without the time of checkpoints."""

    step: int
    seconds_per_step: float = 0.0
    _since: float = field(default_factory=time.monotonic)
    _waited: float = 0.0

    def measure(self, step: int, batch_size: int, loader: Loader) -> dict[str, float]:
        """Images per second (global) and the share of time spent waiting for data, since the last call."""
        now, waited = time.monotonic(), loader.wait_seconds
        seconds = max(now - self._since, 1e-9)
        self.seconds_per_step = seconds / max(step - self.step, 1)
        measured = {
            "images_per_second": (step - self.step) * batch_size / seconds,
            "data_wait": min(1.0, (waited - self._waited) / seconds),
            **loader.fetch_metrics(),
        }
        self.step, self._since, self._waited = step, now, waited
        return measured

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the next measurement."""
        before = time.monotonic()
        yield
        self._since += time.monotonic() - before


def progress_line(step: int, total: int, epoch: float, values: Mapping[str, float], seconds_per_step: float) -> str:
    """`step 120/1875  epoch 0.77  loss 0.832  lr 1.2e-04  294 img/s  data 2%  eta 4:03`."""
    eta = int((total - step) * seconds_per_step)
    clock = f"{eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}" if eta >= 3600 else f"{eta // 60}:{eta % 60:02d}"
    return (
        f"step {step}/{total}  epoch {epoch:.2f}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        f"{values['images_per_second']:.0f} img/s  data {values['data_wait']:.0%}  eta {clock}"
    )


def memory_gb(device: torch.device) -> float:
    """The most memory this process has used: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
