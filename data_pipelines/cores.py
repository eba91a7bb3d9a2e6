"""How many cores this process should use, beside the other ranks of its job on the same machine."""

from __future__ import annotations

import os


def cores_per_process() -> int:
    """The cores this process may run on, divided among the LOCAL_WORLD_SIZE ranks that share them.

    Where the ranks are the tasks of an srun step, each has its --cpus-per-task, or what srun has bound it to.
    """
    ours = len(os.sched_getaffinity(0))
    world_size = os.environ.get("WORLD_SIZE", "1")
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS") == world_size:
        told = os.environ.get("SLURM_CPUS_PER_TASK", "")
        if told.isdigit():
            return max(1, min(ours, int(told)))
        if ours < (os.cpu_count() or 1):
            return ours
    return max(1, ours // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
