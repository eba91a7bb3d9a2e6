"""As `worker.py`, and rank 0 writes down the collectives of every step into `collectives.json` of the run folder.

Beside them the types of the tensors that they carry.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves
from worker import run

from pretrain.engines.engine import initialise_distributed
from pretrain.survival.watchdog import Watchdog

KINDS = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "all_gather_single",
    "all_gather_single_coalesced",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "all_to_all_single",
    "alltoall",
    "alltoall_base",
    "barrier",
)


def count_collectives() -> tuple[list[Counter[str]], set[str]]:
    """Of every step since now, whoever calls them; the last of all that came after the last step's begin. And types."""
    steps: list[Counter[str]] = []
    types: set[str] = set()
    begin_step = Watchdog.step

    def next_step(self: Watchdog, *given: Any) -> None:
        steps.append(Counter())
        begin_step(self, *given)

    def counted(kind: str) -> Any:
        call = getattr(dist.ProcessGroup, kind)

        def collective(*given: Any, **named: Any) -> Any:
            if steps:
                steps[-1][kind] += 1
                types.update(str(leaf.dtype) for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
            return call(*given, **named)

        return collective

    Watchdog.step = next_step  # type: ignore[method-assign]
    for kind in KINDS:
        setattr(dist.ProcessGroup, kind, counted(kind))
    return steps, types


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world_size = initialise_distributed(torch.device("cpu"))
    steps, types = count_collectives()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        steps.clear()
        types.clear()
        run(each, rank, world_size)
        if rank == 0:
            (Path(each["runs"]) / each["name"] / "collectives.json").write_text(
                json.dumps({"steps": steps, "types": sorted(types)})
            )
    sys.stdout.flush()
    os._exit(0)
