"""The peak memory of a step, in a process of its own: what is freed stays with a process otherwise."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def peak_of(step: Callable[[], None], device: torch.device) -> float:
    """MB that a step needs at most beyond what a first one left: of resident memory on a CPU, of torch's on a GPU."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 2**10


def last_number(command: Sequence[str]) -> float:
    """What a fresh process prints last, whose freed tensors go back to the system."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def _status(name: str) -> int:
    """kB of this process, from the kernel."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
