"""How many cores this process should use, beside the other ranks of its job on the same machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
#: What decides how OpenMP's threads wait: of the standard, of GNU's and of Intel's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def cores_per_process() -> int:
    """The cores this process may run on, divided among the LOCAL_WORLD_SIZE ranks that share them.

    What it may run on is its affinity, and no more than the CPU quota of any control group (version 1 or 2) it is in,
    as containers and schedulers set it. Where the ranks are the tasks of an srun step, each has its --cpus-per-task, or
    what srun has bound it to; a quota is a container's around them all.
    """
    ours, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    quota = cpu_quota()
    shared = ours if quota is None else min(ours, quota)
    world_size = os.environ.get("WORLD_SIZE", "1")
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS") == world_size:
        told = os.environ.get("SLURM_CPUS_PER_TASK", "")
        own = int(told) if told.isdigit() else ours if ours < (os.cpu_count() or 1) else None
        if own is not None:
            return max(1, int(min(ours, own) if quota is None else min(ours, own, quota / ranks)))
    return max(1, int(shared / ranks))


def cpu_quota() -> float | None:
    """The least CPU quota, in cores, of the control groups that this process is in; None where there is none."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux, or no /proc
        return None
    quotas = [quota for line in lines for quota in _quotas(line)]
    return min(quotas, default=None)


def _quotas(line: str) -> Iterator[float]:
    """The quotas of one of the process's control groups and of those around it: `4:cpu,cpuacct:/a/b` or `0::/a/b`."""
    _, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    if controllers and "cpu" not in controllers.split(","):
        return
    # in a container the path may be the host's, of which only the root is seen here
    for group in (PurePosixPath(path), *PurePosixPath(path).parents):
        inside = str(group).lstrip("/")
        if not controllers:
            for root in (_CGROUPS, _CGROUPS / "unified"):
                limit, _, period = _read(root / inside / "cpu.max").partition(" ")
                yield from _cores(limit, period)
        else:
            for root in {_CGROUPS / controllers, _CGROUPS / "cpu"}:
                folder = root / inside
                yield from _cores(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _cores(quota: str, period: str) -> Iterator[float]:
    if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # `max` and -1 mean none
        yield int(quota) / int(period)


def sleep_at_barriers(environ: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep where they wait for each other, instead of spinning; call before torch is imported.

    Beside other work on the same cores, a thread that spins takes the time of the one that it waits for: small steps
    beside one busy process were 4 times as slow as need be. With the machine to itself, training is some 10 % slower
    when its threads sleep (tests/bench/busy_machine.py measures both). libgomp reads this once, when it is loaded, and
    processes started from here inherit it; what the user has set of it stays. On a GPU it keeps torch's few threads
    out of the loader's way.
    """
    if not any(name in environ for name in WAITING):
        environ["OMP_WAIT_POLICY"] = "PASSIVE"
