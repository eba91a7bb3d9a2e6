"""How many cores this process should use, beside the other ranks of its job on the same machine."""

from __future__ import annotations

import os


def cores_per_process() -> int:
    """The cores this process may run on, divided among the LOCAL_WORLD_SIZE ranks that share them.

    Under srun with --cpus-per-task each rank has cores of its own already, and keeps them all.
    """
    ours = len(os.sched_getaffinity(0))
    bound = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if bound.isdigit() and "SLURM_STEP_ID" in os.environ:
        return max(1, min(ours, int(bound)))
    return max(1, ours // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
