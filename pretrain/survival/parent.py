"""A rank whose launcher was killed does not train on unseen: it is asked to end, as by the launcher itself."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import MutableMapping

PARENT = "SELFSIGHT_LAUNCHER"  # the process that started the ranks of this machine and forwards signals to them
_PR_SET_PDEATHSIG = 1


def end_with_parent(environ: MutableMapping[str, str]) -> None:
    """From now on this process gets SIGTERM when the launcher that started it is gone, however that ended.

    It then saves and ends, as at any SIGTERM. Nothing where no launcher started it. The variable is taken out of
    `environ`: what this process starts is not the launcher's.
    """
    launcher = environ.pop(PARENT, "")
    if launcher != str(os.getppid()):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(launcher):  # it went between the two
        os.kill(os.getpid(), signal.SIGTERM)
