"""What NCCL's collectives leave behind when they hang: torch's flight recorder (imports torch where it is needed)."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

#: Names as of torch 2.9 and newer; what the user has set stays.
DEFAULTS = {
    "TORCH_FR_BUFFER_SIZE": "2000",  # the last so many collectives of each rank are remembered
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # and written down when one runs into the group's time limit
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # a failed collective ends its process, which a launcher sees
}
TRACES = "nccl_trace_rank_"  # the beginning of a file's name, before the rank: what torch's reader of them expects


def set_defaults(stacks: Path, environ: MutableMapping[str, str] | None = None) -> None:
    """Have the flight recorder on, and its files in the run's folder; before the process group is made."""
    environ = os.environ if environ is None else environ
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environ:  # its older name
        stacks.mkdir(parents=True, exist_ok=True)
        environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(stacks.absolute() / TRACES))


def dump_flight_recorder(stacks: Path) -> None:
    """Write what this rank's recorder remembers, for `torchfrtrace STACKS`; nothing where NCCL is not in use."""
    import torch.distributed as dist

    try:
        if not dist.is_initialized() or dist.get_backend() != "nccl":
            return
        from torch._C._distributed_c10d import _dump_nccl_trace  # private; there is no public name for it

        (stacks / f"{TRACES}{dist.get_rank()}").write_bytes(_dump_nccl_trace())
    except (ImportError, RuntimeError, OSError) as error:
        print(f"the flight recorder could not be written: {error}", flush=True)
