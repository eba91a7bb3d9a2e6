"""Of many ranks, each writes to a file of its own, and only the first one to the job's log (imports no torch)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pretrain.survival.failures import start_of

FOLDER = "logs/ranks"
MANY = 8  # ranks that one log still has room for
CHOICE = "SELFSIGHT_RANK_LOGS"  # 1: always, 0: never


def log_of_rank(run: Path, start: str, rank: int) -> Path:
    """Where a rank of one start of a job writes."""
    return run / FOLDER / start / f"rank-{rank:05d}.log"


def write_apart(run: Path, rank: int, world_size: int, environ: Mapping[str, str] = os.environ) -> Path | None:
    """From here on, what this process writes to stdout and stderr, code in C included, goes to its own file.

    In a SLURM job of more than `MANY` ranks, for all but the first of them, or as `SELFSIGHT_RANK_LOGS` says. Returns
    the file; None where all stays as it is, also where the file can't be written.
    """
    start, choice = start_of(environ), environ.get(CHOICE, "")
    if start is None or rank == 0 or choice == "0" or (world_size <= MANY and choice != "1"):
        return None
    path = log_of_rank(run, start, rank)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(descriptor, number)
        os.close(descriptor)
        return path
    return None
