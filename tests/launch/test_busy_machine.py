"""How torch's threads wait for each other in our processes, beside other work on the same cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack

import pytest

from data_pipelines.cores import WAITING

FROM_THE_COMMAND = """
import sys
from launch.cli import main
try:
    main(["--version"])
except SystemExit:
    assert "torch" not in sys.modules
import torch
"""
#: Two threads that meet twice in a few dozen microseconds; answers each line with the meetings of so many seconds.
MEETINGS = """
import sys, time
import torch
torch.set_num_threads(2)
values = torch.zeros(70_000)
print(flush=True)
for line in sys.stdin:
    count, until = 0, time.perf_counter() + float(line)
    while time.perf_counter() < until:
        values.add_(1).mul_(0.5)
        count += 2
    print(count, flush=True)
"""


def environment(**given: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")} | given


@pytest.mark.parametrize(("own", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_the_command_tells_openmp_before_it_is_loaded(own: Mapping[str, str], policy: str) -> None:
    environ = environment(OMP_DISPLAY_ENV="TRUE", **own)
    done = subprocess.run([sys.executable, "-c", FROM_THE_COMMAND], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    if "OPENMP DISPLAY ENVIRONMENT BEGIN" not in done.stderr:
        pytest.skip("this torch's OpenMP does not tell its settings")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="threads that share a core do not wait for each other")
def test_beside_busy_processes_sleeping_threads_get_further_than_spinning_ones() -> None:
    best = dict.fromkeys(("PASSIVE", "ACTIVE"), 0)
    cores = sorted(os.sched_getaffinity(0))[:2]
    with ExitStack() as held:
        held.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores)  # of all that starts from here
        sides = {}
        for policy in best:
            sides[policy] = subprocess.Popen(
                [sys.executable, "-c", MEETINGS],
                env=environment(OMP_WAIT_POLICY=policy),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            held.callback(sides[policy].kill)
            assert sides[policy].stdout.readline() == "\n"
        for _ in cores:
            held.callback(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]).kill)
        for _ in range(3):
            for policy, process in sides.items():
                process.stdin.write("0.3\n")
                process.stdin.flush()
                best[policy] = max(best[policy], int(process.stdout.readline()))
        for process in sides.values():
            process.stdin.close()
            process.stdout.close()
    assert best["PASSIVE"] > 2 * best["ACTIVE"], best
