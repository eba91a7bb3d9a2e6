"""What is asked of SLURM, and its words for time and GPUs (imports no torch)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ASK_SECONDS = 60  # a busy controller may take long to answer
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_GPUS = re.compile(r"gpu(?::(?P<type>[^:,()]+))?:(?P<count>\d+)")
#: Of the caller's own job, or meant for other jobs: sbatch would take them for options of this one.
_INHERITED = ("SBATCH_", "SLURM_", "SRUN_")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")


def seconds_of(time: str | int) -> int | None:
    """A time limit in SLURM's words, in seconds; None for no limit.

    minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds.
    """
    text = str(time).strip()
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"--time {text!r} is no time; write minutes, hours:minutes:seconds or days-hours:minutes")
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        total = int(match["days"]) * 86_400 + hours * 3600 + minutes * 60 + seconds
    else:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
        total = hours * 3600 + minutes * 60 + seconds
    if total < 60:
        raise ValueError(f"--time {text} is {total} s; SLURM counts in minutes, so give one or more")
    return total


def gpus_of(asked: str | int | None) -> tuple[str | None, int]:
    """`4` or `a100:4` as type and number; None is no GPU."""
    if asked is None:
        return None, 0
    kind, _, count = str(asked).rpartition(":")
    if not count.isdigit() or re.search(r"[\s,:()]", kind):
        raise ValueError(f"--gpus-per-node is {asked!r}; write a number, or TYPE:NUMBER such as a100:4")
    return kind or None, int(count)


@dataclass(frozen=True)
class Node:
    """What one node has."""

    name: str
    cpus: int
    gpus: Mapping[str, int]  # by type; "" for GPUs without one


@dataclass(frozen=True)
class Partition:
    """What a partition has, and whom it takes."""

    name: str
    default: bool
    up: bool
    max_seconds: int | None
    max_nodes: int | None
    allowed: Mapping[str, tuple[str, ...]]  # AllowAccounts, DenyAccounts, AllowQos, DenyQos, where not ALL
    nodes: tuple[Node, ...]


def sbatch_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for sbatch: its options are those of the script, none comes from variables."""
    return {name: value for name, value in environ.items() if name in _KEPT or not name.startswith(_INHERITED)}


def ask(command: Sequence[str]) -> str:
    """What a SLURM command prints. Raises OSError where it can't be asked, with SLURM's own words."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(
            f"there is no {command[0]} here; submit from a login node of the cluster (`--dry-run` works anywhere)"
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False, env=sbatch_environment()
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} did not answer within {ASK_SECONDS} s; try again later") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise OSError(f"{command[0]} says: {said}")
    return done.stdout


def partitions() -> list[Partition]:
    """All partitions of the cluster."""
    nodes: dict[str, list[Node]] = {}
    for line in ask(["sinfo", "--noheader", "--Node", "--format", "%R|%N|%c|%G"]).splitlines():
        partition, name, cpus, gres = line.split("|", 3)
        gpus: dict[str, int] = {}
        for match in _GPUS.finditer(gres):
            kind = match["type"] or ""
            gpus[kind] = gpus.get(kind, 0) + int(match["count"])
        nodes.setdefault(partition, []).append(Node(name, int(cpus.rstrip("+")), gpus))
    found = []
    for line in ask(["scontrol", "--oneliner", "show", "partition"]).splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        if "PartitionName" not in fields:
            continue
        name = fields["PartitionName"]
        limit = fields.get("MaxTime", "UNLIMITED")
        found.append(
            Partition(
                name=name,
                default=fields.get("Default") == "YES",
                up=fields.get("State", "UP") == "UP",
                max_seconds=seconds_of(limit) if limit[:1].isdigit() else None,
                max_nodes=int(fields["MaxNodes"]) if fields.get("MaxNodes", "").isdigit() else None,
                allowed={
                    key: tuple(fields[key].split(","))
                    for key in ("AllowAccounts", "DenyAccounts", "AllowQos", "DenyQos")
                    if fields.get(key, "ALL") != "ALL"
                },
                nodes=tuple(nodes.get(name, ())),
            )
        )
    return found


def accounts_of(user: str) -> list[tuple[str, ...]] | None:
    """(account, partition, qos list) that `user` may use; None where the cluster keeps no accounts."""
    try:
        said = ask(
            ["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=account,partition,qos"]
        )
    except OSError:
        return None
    return [tuple(line.split("|")) for line in said.splitlines() if line.count("|") == 2] or None


def array_limit() -> int | None:
    """How many elements an array may have; None where SLURM does not say."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE)
    return int(found[1]) if found else None
