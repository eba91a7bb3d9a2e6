"""Which process am I, of how many, and where is the first one? Read from the environment (imports no torch)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

#: How long a rank waits with an error that the first one may have, too: starts differ by seconds.
WAIT_SECONDS = 10.0
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """One process's place in its group."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int | None  # None: this process is alone and may take any free port
    local_world_size: int = 1  # ranks on this machine

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Set the variables that torch.distributed reads."""
        environ["RANK"] = str(self.rank)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        environ["MASTER_ADDR"] = self.master_addr
        if self.master_port is not None:
            environ["MASTER_PORT"] = str(self.master_port)


def rank_environment(environ: Mapping[str, str]) -> Ranks:
    """Read the variables of torchrun (and of the deepspeed launcher), else of srun, else be a single process.

    A batch script also has SLURM_PROCID, but only the tasks of an srun step have SLURM_STEP_ID: python started
    without srun is alone, and does not wait for tasks that nobody started.
    Raises ValueError when the variables name only part of a group.
    """
    if "RANK" in environ:
        return _from_torchrun(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        return _from_srun(environ)
    return Ranks(rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=None)


def _from_torchrun(environ: Mapping[str, str]) -> Ranks:
    if environ.get("WORLD_SIZE") == "1":
        environ = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", **environ}
    needed = TORCHRUN if environ.get("WORLD_SIZE") != "1" else TORCHRUN[:-1]
    missing = [name for name in needed if name not in environ]
    if missing:
        raise ValueError(
            f"RANK is {environ['RANK']} but {', '.join(missing)} not set, which its launcher should have done; "
            "start with torchrun, srun or `selfsight launch`, or unset RANK for a single process"
        )
    port = environ.get("MASTER_PORT")
    return _checked(
        Ranks(
            rank=_integer(environ, "RANK"),
            local_rank=_integer(environ, "LOCAL_RANK"),
            world_size=_integer(environ, "WORLD_SIZE"),
            master_addr=environ["MASTER_ADDR"],
            master_port=None if port is None else _integer(environ, "MASTER_PORT"),
            # torchrun's name for it, or the deepspeed launcher's
            local_world_size=next(
                (_integer(environ, n) for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), 1
            ),
        )
    )


def _from_srun(environ: Mapping[str, str]) -> Ranks:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    missing = [name for name in (tasks, "SLURM_LOCALID", "SLURM_JOB_ID") if name not in environ]
    if missing:
        raise ValueError(f"this looks like an srun task, but {', '.join(missing)} not set; start it with srun")
    world_size = _integer(environ, tasks)
    if world_size == 1:
        return Ranks(rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=None)
    port = environ.get("MASTER_PORT")
    return _checked(
        Ranks(
            rank=_integer(environ, "SLURM_PROCID"),
            local_rank=_integer(environ, "SLURM_LOCALID"),
            world_size=world_size,
            master_addr=environ.get("MASTER_ADDR") or _first_host(environ),
            master_port=_slurm_port(environ) if port is None else _integer(environ, "MASTER_PORT"),
            local_world_size=_tasks_on_this_node(environ),
        )
    )


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port that all tasks agree on, below the ephemeral ones, and that others on the same nodes do not take.

    Ids of jobs count up by one, also those of an array's elements, and each has 32 ports: for its steps, and others
    after a requeue, lest a port that was taken by somebody else kill each restart anew.
    """
    restart = environ.get("SLURM_RESTART_COUNT", "")
    within = _integer(environ, "SLURM_STEP_ID") + 5 * (int(restart) if restart.isdigit() else 0)
    return 10_000 + (_integer(environ, "SLURM_JOB_ID") * 32 + within % 32) % 20_000


def tasks_of_nodes(environ: Mapping[str, str]) -> dict[str, int] | None:
    """How many tasks of this srun step each of its nodes has, by name; None where SLURM did not start us.

    Raises ValueError where the list of nodes can't be expanded.
    """
    nodes = environ.get("SLURM_STEP_NODELIST")
    counts = _tasks_by_node(environ)
    if not nodes or not counts:
        return None
    names = _hostnames(nodes)
    return dict(zip(names, counts, strict=True)) if len(names) == len(counts) else None


def _tasks_by_node(environ: Mapping[str, str]) -> list[int]:
    """SLURM lists the tasks of a step by node as `4(x2),3`: 4 on each of two nodes, then 3."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    return counts


def _tasks_on_this_node(environ: Mapping[str, str]) -> int:
    counts = _tasks_by_node(environ)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 1


def _first_host(environ: Mapping[str, str]) -> str:
    """Where rank 0 is: the step's first host, by its name, or by SLURM's address of it where names do not resolve."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError("SLURM_JOB_NODELIST is not set; start with srun, or set MASTER_ADDR to the host of rank 0")
    first = _hostnames(nodes)[0]
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if address := re.search(r"NodeAddr=(\S+)", _scontrol("node", first)):
                return address[1]
    return first


def _hostnames(nodes: str) -> list[str]:
    """A node list expanded; `scontrol` does so by itself, without asking the controller."""
    if not re.search(r"[\[,]", nodes):
        return [nodes]
    try:
        return _scontrol("hostnames", nodes).split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"can't expand the node list {nodes} ({error}); set MASTER_ADDR to the host of rank 0"
        ) from None


def _scontrol(*what: str) -> str:
    return subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, check=True, timeout=60).stdout


def check_gpus(environ: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse an srun step whose tasks on this node are not as many as its GPUs there."""
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if "SLURM_STEP_ID" not in environ or "RANK" in environ or not gpus.isdigit() or int(gpus) == 0:
        return
    if int(gpus) != ranks.local_world_size:
        raise ValueError(
            f"this step has {gpus} GPUs but {ranks.local_world_size} tasks on node "
            f"{environ.get('SLURMD_NODENAME', '?')}, and each task trains on one; start it with "
            f"--ntasks-per-node={gpus}, or ask for as many GPUs as tasks (engine.device=cpu leaves them alone)"
        )


def rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank as far as the environment tells, 0 where it makes no sense."""
    name = "RANK" if "RANK" in environ else "SLURM_PROCID" if "SLURM_STEP_ID" in environ else ""
    value = environ.get(name, "")
    return int(value) if value.isdigit() else 0


def after_the_first(rank: int, code: int, seconds: float = WAIT_SECONDS) -> None:
    """Wait with an error, so that one which all ranks have is told once, by rank 0.

    Its launcher (srun --kill-on-bad-exit, torchrun, `selfsight launch`) then asks the others to end, and this one does,
    with the same exit code and in silence. Nobody asks: the error is this rank's own, and the caller tells it.
    """
    if rank == 0:
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(seconds)


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} is {environ[name]!r}; it must be a whole number") from None


def _checked(ranks: Ranks) -> Ranks:
    if not 0 <= ranks.rank < ranks.world_size:
        raise ValueError(
            f"rank {ranks.rank} is not in a group of {ranks.world_size}; ranks go from 0 to {ranks.world_size - 1}"
        )
    return ranks
