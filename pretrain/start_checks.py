"""What a run asks of the machine it starts on, and of its own length: refused before anything is written.

Checked where it runs, not where its configuration is read: that may be a login node with other cores.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from pretrain.config import Config
from pretrain.config.errors import ConfigError

#: Threads, or processes, for each core of the machine, beyond which they only stand in each other's way.
MOST_PER_CORE = 16


def check_machine(config: Config, device: torch.device) -> None:
    """Raise ConfigError for what this machine can't give a run: threads and processes, compilers."""
    check_cores(config, os.cpu_count() or 1)
    if config.engine.compile:
        check_compilers(device)


def check_cores(config: Config, cores: int) -> None:
    """Raise ConfigError for more threads, or processes that make batches, than `cores` bear."""
    most, data = MOST_PER_CORE * cores, config.data
    workers = data.workers if isinstance(data.workers, int) else 0
    for key, value in (
        ("engine.threads", config.engine.threads),
        ("data.workers", workers),
        ("data.threads", data.threads),
    ):
        if value is not None and value > most:
            raise ConfigError(
                f"{key} is {value}, and this machine has {_cores(cores)}: up to {most} are taken, {MOST_PER_CORE} a "
                f"core; leave it out for as many as there are cores"
            )
    if workers * (data.threads or 1) > most:
        raise ConfigError(
            f"data.workers x data.threads is {workers} x {data.threads} = {workers * (data.threads or 1)} threads, and "
            f"this machine has {_cores(cores)}: up to {most} are taken, {MOST_PER_CORE} a core; lower one of them, or "
            "leave both out"
        )


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def check_profile(config: Config, total_steps: int) -> None:
    """Raise ConfigError for a trace that begins after the last of a run's steps."""
    steps = config.tracking.profile_steps
    if steps is not None and steps[0] > total_steps:
        last = min(total_steps, 1 + steps[1] - steps[0])
        raise ConfigError(
            f"tracking.profile_steps is {list(steps)} (--profile: 10 to 12), and the run ends with step {total_steps}; "
            f"choose steps that it reaches, such as tracking.profile_steps=[{max(1, total_steps - last + 1)},"
            f"{total_steps}], or train for longer"
        )


def check_compilers(device: torch.device) -> None:
    """Raise ConfigError unless `engine.compile` finds here what it compiles with, by torch's own search."""
    missing = _missing_for_gpu() if device.type == "cuda" else _missing_for_cpu()
    if missing:
        raise ConfigError(f"engine.compile is true, and {missing}, or set engine.compile=false")


def _missing_for_cpu() -> str | None:
    """What compiled code for a CPU lacks on this machine, and how to get it."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError):
        named = f"CXX={os.environ['CXX']} can't be run" if "CXX" in os.environ else "there is no g++"
        return f"{named}: install g++ (apt-get install g++)" + ("; or unset CXX" if "CXX" in os.environ else "")
    return _missing_headers()


def _missing_for_gpu() -> str | None:
    """What Triton lacks on this machine, and how to get it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, which torch compiles for GPUs with: pip install triton"
    named = os.environ.get("CC")
    compiler = named or shutil.which("gcc") or shutil.which("clang")
    try:
        if compiler is not None:
            subprocess.run([compiler, "--version"], check=True, capture_output=True)
            return _missing_headers()
    except (OSError, subprocess.SubprocessError):
        pass
    told = f"CC={named} can't be run" if named else "there is no C compiler, which Triton needs"
    return f"{told}: install gcc (apt-get install gcc)" + ("; or unset CC" if named else "")


def _missing_headers() -> str | None:
    folder = Path(sysconfig.get_path("include"))
    if (folder / "Python.h").is_file():
        return None
    return f"Python's headers are not in {folder}: install them (apt-get install python3-dev)"
