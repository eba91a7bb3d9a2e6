"""Lines of libraries that no reader of a run's progress can act on (imports no torch)."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from pathlib import Path

#: Beyond all levels of torch's profiler, of which the lines on its own beginning and end are the highest.
_NOTHING = "99"
#: Of NVIDIA's and of AMD's GPUs.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
#: DeepSpeed's words on an optimizer that is not one of its own: it is torch's AdamW by intent.
_UNTESTED = "You are using ZeRO with an untested optimizer"


def quiet_profiler(environ: MutableMapping[str, str]) -> None:
    """Keep the profiler of a run on a CPU from naming a missing GPU an error; call before torch is imported.

    What the user has set of it stays. On a machine with a GPU its errors may be of that, and are left.
    """
    if not any(Path(driver).exists() for driver in _DRIVERS):
        environ.setdefault("KINETO_LOG_LEVEL", _NOTHING)


def quiet_deepspeed() -> None:
    """Leave DeepSpeed's line on untested optimizers out of its log."""
    log = logging.getLogger("DeepSpeed")
    if _tells_more not in log.filters:
        log.addFilter(_tells_more)


def _tells_more(record: logging.LogRecord) -> bool:
    return _UNTESTED not in record.getMessage()
