"""N processes of one command on this machine, as one: started, signalled and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from launch.ranks import Ranks
from pretrain.survival.parent import PARENT
from pretrain.survival.stopping import EXIT_STOPPED

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 0.05


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules, never a file of the same name in the working directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def safe_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a process of ours: those it starts do not import from the working directory either."""
    return {**environ, "PYTHONSAFEPATH": "1"}


def launch_local(command: Sequence[str], nproc: int, grace_seconds: float = 30.0) -> int:
    """Run `nproc` copies of `command` with the ranks' variables set; return 0, or the first failure's exit code.

    Rank 0 writes to our own output; the lines of the others go to stderr, marked with their rank. SIGTERM, SIGINT
    and SIGUSR1 are forwarded. When one process fails, it is named, the others are asked to end (SIGTERM) and,
    `grace_seconds` later, killed with all they started; a second SIGINT kills at once. A death by signal s counts as
    128 + s. Where this process is killed itself, those it started are asked to end: see `end_with_parent`.
    """
    if nproc < 1:
        raise ValueError(f"nproc is {nproc}; start at least 1 process")
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    interrupts = 0

    def forward(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += signum == signal.SIGINT
        for process in processes:
            if interrupts > 1:
                _kill(process)
            elif process.poll() is None:
                process.send_signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in FORWARDED}
    try:
        port = _free_port()
        for rank in range(nproc):
            environ = safe_environment(os.environ)
            Ranks(rank, rank, nproc, "127.0.0.1", port, local_world_size=nproc).export(environ)
            environ[PARENT] = str(os.getpid())
            processes.append(_start(command, environ, shared_output=rank == 0))
            if rank:
                readers.append(threading.Thread(target=_relay, args=(processes[rank], rank), daemon=True))
                readers[-1].start()
        return _wait(processes, grace_seconds)
    finally:
        for process in processes:
            _kill(process)
            process.wait()
        for reader in readers:
            reader.join(timeout=1)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _start(command: Sequence[str], environ: Mapping[str, str], shared_output: bool) -> subprocess.Popen[str]:
    output = None if shared_output else subprocess.PIPE
    # a session of its own: a terminal's Ctrl-C then arrives once, through us, and _kill reaches grandchildren
    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if shared_output else subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _wait(processes: Sequence[subprocess.Popen[str]], grace_seconds: float) -> int:
    first_failure, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        if not first_failure:
            failed = next((rank for rank, process in enumerate(processes) if _exit_code(process)), None)
            if failed is not None:
                first_failure = _exit_code(processes[failed])
                _tell(failed, processes)
                deadline = time.monotonic() + grace_seconds
                for process in processes:
                    if process.poll() is None:
                        process.terminate()
        if time.monotonic() > deadline:
            for process in processes:
                _kill(process)
        time.sleep(POLL_SECONDS)
    return first_failure or next((code for code in map(_exit_code, processes) if code), 0)


def _tell(rank: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Who failed first: the others' messages, which are of a connection that closed, name no one."""
    code = processes[rank].returncode
    if code == EXIT_STOPPED:  # it was asked to
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    killed = " (out of memory? `dmesg | tail` says)" if code == -signal.SIGKILL else ""
    others = "" if len(processes) == 1 else "; the others are asked to end, and what they say of it comes from that"
    print(
        f"rank {rank} (pid {processes[rank].pid}) {how}{killed}{others}. The same command goes on from the last "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )


def _exit_code(process: subprocess.Popen[str]) -> int:
    """What a shell would report; 0 while it runs."""
    code = process.poll() or 0
    return code if code >= 0 else 128 - code


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and whatever it left running; no-op when all are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _relay(process: subprocess.Popen[str], rank: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[rank {rank}] {line}", end="", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
