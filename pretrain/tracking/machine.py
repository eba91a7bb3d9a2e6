"""What one process can tell of its machine and its GPU, in a fixed list of numbers."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GB = 1e9
MB = 1e6
#: Of a node; told by its first rank.
NODE = (
    "cpu_percent",  # of all cores
    "load",  # processes that want a core, mean over a minute
    "memory_used_gb",
    "memory_available_gb",
    "swap_used_gb",
    "run_disk_free_gb",
    "cache_disk_free_gb",
    "disk_read_mb_per_s",
    "disk_write_mb_per_s",
    "network_in_mb_per_s",
    "network_out_mb_per_s",
)
#: Of a rank with its child processes; summed over those of a node.
RANK = ("processes_gb", "open_files")
#: Of a rank's GPU.
GPU = ("gpu/utilisation_percent", "gpu/memory_used_gb", "gpu/temperature_c", "gpu/power_w", "gpu/throttled")
NAMES = (*NODE, *RANK, *GPU)
#: NVML's reasons for a slower clock that are trouble: software and hardware heat and power limits, not idleness.
THROTTLED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


def node_name() -> str:
    """This machine as SLURM calls it, or by its host name, in letters that no dashboard takes for its own."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:48] or "node"


class Machine:
    """Samples in the order of `NAMES`; what can't be known is NaN, and nothing raises."""

    def __init__(self, run: Path, cache: Path, first_of_node: bool, gpu: int | None) -> None:
        """`run` and `cache`: folders whose disks are watched. `gpu`: this rank's, as torch counts them."""
        self.run, self.cache, self.first_of_node = run, cache, first_of_node
        self.gpu = None if gpu is None else _nvml_handle(gpu)
        self._before: dict[str, tuple[float, float]] = {}

    def sample(self) -> list[float]:
        """The present numbers; those per second, and the CPU's, are means since the last call."""
        values: dict[str, float] = {}
        parts = {self._node: self.first_of_node, self._processes: True, self._of_gpu: self.gpu is not None}
        for part, applies in parts.items():
            if applies:
                with suppress(Exception):  # of psutil, NVML and file systems; a number less is no reason to stop
                    part(values)
        return [values.get(name, float("nan")) for name in NAMES]

    def _node(self, values: dict[str, float]) -> None:
        import psutil

        values["cpu_percent"] = psutil.cpu_percent(interval=None)
        values["load"] = os.getloadavg()[0]
        memory = psutil.virtual_memory()
        values["memory_used_gb"], values["memory_available_gb"] = memory.used / GB, memory.available / GB
        values["swap_used_gb"] = psutil.swap_memory().used / GB
        network, disk = psutil.net_io_counters(), psutil.disk_io_counters()
        self._rate(values, "network_in_mb_per_s", network.bytes_recv)
        self._rate(values, "network_out_mb_per_s", network.bytes_sent)
        if disk is not None:
            self._rate(values, "disk_read_mb_per_s", disk.read_bytes)
            self._rate(values, "disk_write_mb_per_s", disk.write_bytes)
        for name, folder in (("run_disk_free_gb", self.run), ("cache_disk_free_gb", self.cache)):  # last: may be stale
            with suppress(OSError):
                values[name] = shutil.disk_usage(_existing(folder)).free / GB

    def _rate(self, values: dict[str, float], name: str, total: float) -> None:
        now = time.monotonic()
        if name in self._before:
            then, before = self._before[name]
            values[name] = max(0.0, total - before) / MB / max(now - then, 1e-3)
        self._before[name] = now, total

    def _processes(self, values: dict[str, float]) -> None:
        import psutil

        me = psutil.Process()
        resident, files = 0, 0
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.Error):  # it may have ended meanwhile
                resident += process.memory_info().rss
                files += process.num_fds()
        values["processes_gb"], values["open_files"] = resident / GB, float(files)

    def _of_gpu(self, values: dict[str, float]) -> None:
        import pynvml

        readings: dict[str, Any] = {
            "utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(self.gpu).gpu,
            "memory_used_gb": lambda: pynvml.nvmlDeviceGetMemoryInfo(self.gpu).used / GB,
            "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(self.gpu, pynvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(self.gpu) / 1000,
            "throttled": lambda: bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.gpu) & THROTTLED),
        }
        for name, read in readings.items():
            with suppress(Exception):  # a card or a driver may lack any one of them
                values[f"gpu/{name}"] = float(read())


def _nvml_handle(gpu: int) -> Any:
    """NVML's handle of the GPU that torch calls `gpu`, which CUDA_VISIBLE_DEVICES may have renumbered; None without."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(gpu).uuid}".encode())
    except Exception:  # no driver, no library, a device that hides itself
        return None


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
