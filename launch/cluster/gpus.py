"""The GPUs that this process may use, as nvidia-smi tells of them (imports no torch)."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

ASK_SECONDS = 20  # a driver that has lost a GPU lets nvidia-smi wait for ever
_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")


class SmiError(Exception):
    """nvidia-smi is there and fails, or does not answer."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in MiB, `errors` the uncorrected ones of its memory since the driver started."""

    index: int
    uuid: str
    name: str
    memory: int | None
    used: int | None
    errors: int | None
    processes: tuple[int, ...] = ()  # of anybody; empty also where a container hides them


def visible_gpus(environ: Mapping[str, str]) -> list[Gpu] | None:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves, all without it; None where there is no nvidia-smi.

    Raises SmiError when nvidia-smi fails. Of a GPU cut into parts (MIG), each visible part counts as a GPU.
    """
    try:
        rows = _ask(f"--query-gpu={','.join(_FIELDS)}")
    except FileNotFoundError:
        return None
    if any(len(row) != len(_FIELDS) for row in rows):
        raise SmiError(f"nvidia-smi prints what is not understood: {rows[0]}")
    gpus = [
        Gpu(int(index), uuid, name, _number(memory), _number(used), _number(errors))
        for index, uuid, name, memory, used, errors in rows
    ]
    busy: dict[str, list[int]] = {}
    for uuid, *rest in _ask("--query-compute-apps=gpu_uuid,pid"):
        if rest and rest[0].isdigit():  # else it is not for us to know
            busy.setdefault(uuid, []).append(int(rest[0]))
    gpus = [Gpu(g.index, g.uuid, g.name, g.memory, g.used, g.errors, tuple(busy.get(g.uuid, ()))) for g in gpus]
    return _visible(gpus, environ.get("CUDA_VISIBLE_DEVICES"))


def driver_version() -> str | None:
    """Of the NVIDIA driver; None where there is none."""
    try:
        rows = _ask("--query-gpu=driver_version")
    except (FileNotFoundError, SmiError):
        return None
    return rows[0][0] if rows else None


def _visible(gpus: list[Gpu], wanted: str | None) -> list[Gpu]:
    if wanted is None:
        return gpus
    found = []
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        if name.startswith("MIG") and gpus:
            found.append(gpus[0])
            continue
        match = [gpu for gpu in gpus if name == str(gpu.index) or gpu.uuid.startswith(name)]
        if not match:
            break  # as CUDA does: what follows a device that is not there is not seen either
        found.append(match[0])
    return found


def _ask(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS)
    except subprocess.TimeoutExpired:
        raise SmiError(f"nvidia-smi gave no answer in {ASK_SECONDS} s") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:300]
        raise SmiError(f"nvidia-smi failed with exit code {done.returncode}: {said}")
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _number(text: str) -> int | None:
    """`[N/A]` and `[Not Supported]` are None."""
    return int(text) if text.isdigit() else None
