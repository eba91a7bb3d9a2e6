"""A small process that kills another one which no longer says that it lives: `python killer.py PID`.

A thread can't end its process while it is stopped, waits for a dead disk, or while code in C keeps Python's lock. Reads
`SECONDS` lines from its input: kill the process if no other line follows within that time. The end of input is the
end of the process, or of the need to watch it. Imports nothing but the standard library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

TICK = 0.5


def start() -> subprocess.Popen[bytes]:
    """Have this process watched; nothing happens to it before the first `feed`."""
    # every thread's stack on QUIT, even while C code keeps Python's lock; also for whoever asks by `kill -QUIT PID`
    faulthandler.register(signal.SIGQUIT, file=sys.__stderr__ or 2, all_threads=True, chain=False)
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)


def feed(guard: subprocess.Popen[bytes], seconds: float) -> None:
    """This process lives, and will say so again within `seconds`."""
    assert guard.stdin
    with contextlib.suppress(OSError):  # a guard that is gone guards nobody
        guard.stdin.write(b"%.3f\n" % seconds)


def end(guard: subprocess.Popen[bytes]) -> None:
    """Stop watching."""
    assert guard.stdin
    with contextlib.suppress(OSError):
        guard.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guard.wait(timeout=5)


def watch(pid: int) -> None:
    """Wait for the end of input, or for too long a silence, and then end the process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # some clusters send them to every process of a step
    allowed, silent = float("inf"), 0.0
    while os.getppid() == pid:
        looked = time.monotonic()
        readable, _, _ = select.select([0], [], [], TICK)
        if readable:
            text = os.read(0, 65536)
            if not text:
                return
            allowed, silent = float(text.split()[-1]), 0.0
        silent += min(time.monotonic() - looked, 2 * TICK)  # a whole job that is suspended and comes back lives
        if silent > allowed:
            kill(pid, silent)
            return


def kill(pid: int, silent: float) -> None:
    """Have the process show its stacks, which a stopped one can't, and kill it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return
    states = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or a device"}
    why = states.get(state, "running code that does not let Python run")
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    os.write(2, f"{rank}process {pid} has given no sign of life for {silent:.0f} s, {why}; it is killed\n".encode())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGQUIT)  # faulthandler shows the stacks
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
