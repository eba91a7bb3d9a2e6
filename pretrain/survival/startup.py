"""From the start of the process to the first step: where the time goes (imports no torch)."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_pipelines.remote.urls import redact
from pretrain.survival.history import try_record

PACKAGES = ("torch", "deepspeed", "timm", "selfsight")


class StartUp:
    """Seconds of each phase, in the order they happened; counted from the start of the process.

    preset: The name or path of the preset that was chosen, for the run's history; None where there is none.
    """

    def __init__(self, age: float | None = None, preset: str | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.preset = preset
        self._last = time.monotonic() - (process_age() if age is None else age)

    def mark(self, phase: str) -> None:
        """A phase ends here, and the next begins."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def done(self, run: Path, rank: int, world_size: int, **about: Any) -> None:
        """The first step is made: say how long that took and why, and remember it with what else there is."""
        self.mark("first step")
        if not gc.isenabled():  # by who wanted its imports fast; what lives by now stays, and is never searched again
            gc.freeze()
            gc.enable()
        if rank == 0:
            print(self.line(), flush=True)
            try_record(run, "started", **about, **self.details(os.environ, world_size))

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def line(self) -> str:
        """`first step after 14.2 s: imports 6.1, engine 3.0, ...`, the longest first, and what could be mended."""
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in parts if seconds >= 0.05)
        return "\n".join([f"first step after {self.total:.1f} s: {listed}", *uncompiled()])

    def details(self, environ: Mapping[str, str], world_size: int) -> dict[str, Any]:
        """What the run's history remembers of a start."""
        return {
            "command": command_line(),
            "preset": self.preset,
            "ranks": world_size,
            "nodes": num_nodes(environ, world_size),
            "versions": {"python": sys.version.split()[0], **versions()},
            "seconds": {phase: round(seconds, 2) for phase, seconds in self.seconds.items()},
        }


def command_line() -> list[str]:
    """What this process was started with, as it would be typed: without the folder of the interpreter."""
    program = Path(sys.argv[0])
    module = program.parent.name if program.name == "__main__.py" else None
    return [*(["python", "-m", module] if module else [program.name]), *map(redact, sys.argv[1:])]


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def num_nodes(environ: Mapping[str, str], world_size: int) -> int:
    """Machines of the group: SLURM's count or torchrun's, else ranks by ranks on this machine."""
    for name in ("SLURM_STEP_NUM_NODES", "GROUP_WORLD_SIZE"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    local = environ.get("LOCAL_WORLD_SIZE", "1")
    return -(-world_size // max(1, int(local) if local.isdigit() else 1))


def versions() -> dict[str, str]:
    """Of the packages that what is learned depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder that is not installed
            continue
    return found


def uncompiled() -> list[str]:
    """A line where torch lies without bytecode and none can be written beside it: each start then compiles it anew."""
    spec = find_spec("torch")
    if spec is None or spec.cached is None or Path(spec.cached).exists():
        return []
    return [
        f"torch has no compiled bytecode ({spec.cached} is missing), and each start compiles thousands of files: run "
        f"`{sys.executable} -m compileall -q SITE-PACKAGES` where the environment is built, or set "
        "PYTHONPYCACHEPREFIX to a folder that the nodes can write to and keep"
    ]
