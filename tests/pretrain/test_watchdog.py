from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, time
from pretrain.watchdog import Watchdog

watchdog = Watchdog(float(sys.argv[1]) if sys.argv[1] != "never" else None)

def hung_in_a_collective():
    time.sleep(float(sys.argv[2]))

with watchdog:
    for _ in range(2):
        watchdog.feed()
        hung_in_a_collective()
time.sleep(1.2)
print("finished")
"""


def run(seconds: str, sleep: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, seconds, sleep]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_hung_process_shows_where_and_ends() -> None:
    done = run("0.2", "30")
    assert done.returncode == 1
    assert "hung_in_a_collective" in done.stderr


def test_one_that_goes_on_is_left_alone_and_so_is_what_comes_after() -> None:
    done = run("1", "0.01")
    assert (done.returncode, done.stdout.strip()) == (0, "finished")


def test_it_can_be_turned_off() -> None:
    assert run("never", "0.01").stdout.strip() == "finished"
