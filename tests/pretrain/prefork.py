"""Ranks as forks of one process that has imported torch, timm and DeepSpeed, which takes most of a tiny run's time.

    codes = run_ranks("worker.py", ["configs.json"], [{"RANK": "0", ...}, ...], [Path("0.log"), ...])

A rank is a process of its own in all else: its environment, its output, its group of ranks, its end.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
#: A script sees its own folder and what is installed, which may be another checkout.
OF_THIS_CHECKOUT = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
_SECONDS = 600.0  # in which the ranks must have ended
_servers: dict[int, subprocess.Popen[str]] = {}  # by the process that asks: pytest's workers fork none of each other's


def run_ranks(
    worker: str,
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    logs: Sequence[Path],
) -> list[int]:
    """Run `worker ARGUMENT...` in each of the environments, at the same time; their exit codes when all have ended.

    Beside its own, a rank has the environment that this module was imported in.
    """
    server = _servers.get(os.getpid())
    if server is None:
        command = [sys.executable, str(Path(__file__))]
        server = subprocess.Popen(
            command, env=OF_THIS_CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _servers[os.getpid()] = server
    assert server.stdin is not None
    assert server.stdout is not None
    asked = {"worker": worker, "arguments": [*arguments], "environments": environments, "logs": [*map(str, logs)]}
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks the ranks has died"
    codes: list[int] = json.loads(answer)
    return codes


def _serve() -> None:
    import torch
    from faulty_worker import plant  # noqa: F401  with all that the workers import

    from pretrain.engines.engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "of a thread, a fork would have the locks only"
        ranks = []
        for environment, log in zip(asked["environments"], asked["logs"], strict=True):
            rank = os.fork()
            if not rank:
                _become(asked["worker"], asked["arguments"], environment, log)
            ranks.append(rank)
        answers.write(json.dumps(_wait(ranks)) + "\n")
        answers.flush()


def _become(worker: str, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    code = 1
    try:
        os.environ.update(environment)
        with Path(log).open("w") as output, Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = [worker, *arguments]
        runpy.run_path(str(HERE / worker), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(ranks: Sequence[int]) -> list[int]:
    """The exit codes, negative for a signal's number as `subprocess` has them; what hangs is killed."""
    deadline, ended = time.monotonic() + _SECONDS, dict[int, int]()
    while len(ended) < len(ranks):
        for rank in [rank for rank in ranks if rank not in ended]:
            pid, status = os.waitpid(rank, os.WNOHANG)
            if pid:
                ended[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.01)
    return [ended[rank] for rank in ranks]


if __name__ == "__main__":
    _serve()
