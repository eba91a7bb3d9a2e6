"""Several local processes as one, with a trivial program in place of training."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import launch_local

TELL = """
import os, pathlib, sys
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
print("hello from", os.environ["RANK"])
"""
RANK_1_FAILS = """
import os, sys, time
if os.environ["RANK"] == "1": sys.exit(7)
time.sleep(60)
"""
WAIT_FOR_SIGNAL = """
import os, pathlib, signal, sys, time
def stop(number, _): os._exit(85 if number == signal.SIGUSR1 else 86)
signal.signal(signal.SIGUSR1, stop); signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(60)
"""


def python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, args)]


def test_every_process_knows_its_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(python(TELL, tmp_path), 3) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:5] for place in told] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({place[5] for place in told}) == 1
    out, err = capfd.readouterr()
    assert out == "hello from 0\n"
    assert sorted(err.splitlines()) == ["[rank 1] hello from 1", "[rank 2] hello from 2"]


def test_one_failure_ends_all_with_its_code_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert launch_local(python(RANK_1_FAILS), 3) == 7
    assert time.monotonic() - start < 30
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"rank 1 \(pid \d+\) ended with exit code 7; the others are asked to end, .*", line)


def test_a_killed_process_is_named_with_its_signal(capfd: pytest.CaptureFixture[str]) -> None:
    killed = "import os, signal\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n" + RANK_1_FAILS
    assert launch_local(python(killed), 2) == 128 + signal.SIGKILL
    assert "was ended by SIGKILL (out of memory?" in capfd.readouterr().err


LAUNCHES = """
import sys
from launch.local import launch_local
launch_local([sys.executable, "-c", sys.argv[1], sys.argv[2]], 2)
"""
TOLD_OF_ITS_END = """
import os, pathlib, signal, sys, time
from pretrain.survival.parent import PARENT, end_with_parent
place = pathlib.Path(sys.argv[1], os.environ["RANK"])
def stop(number, _):
    place.with_suffix(".ended").touch()
    os._exit(85)
signal.signal(signal.SIGTERM, stop)
end_with_parent(os.environ)
assert PARENT not in os.environ
place.touch()
time.sleep(60)
"""


def test_ranks_are_asked_to_end_where_their_launcher_is_killed(tmp_path: Path) -> None:
    launcher = subprocess.Popen(python(LAUNCHES, TOLD_OF_ITS_END, tmp_path))
    wait_for(tmp_path, "0", "1")
    launcher.kill()
    assert launcher.wait() == -signal.SIGKILL
    wait_for(tmp_path, "0.ended", "1.ended")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "0.ended", "1", "1.ended"]


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, list(folder.iterdir())
        time.sleep(0.05)


def test_a_process_that_ignores_the_request_is_killed() -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + RANK_1_FAILS
    start = time.monotonic()
    assert launch_local(python(stubborn), 2, grace_seconds=0.2) == 7
    assert time.monotonic() - start < 30


def test_a_death_by_signal_is_told_as_a_shell_does() -> None:
    assert launch_local(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 1) == 128 + 9


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 86)])
def test_signals_reach_every_process(tmp_path: Path, number: int, code: int) -> None:
    command = python(WAIT_FOR_SIGNAL, tmp_path)
    launcher = subprocess.Popen(
        python("import sys; from launch.local import launch_local; sys.exit(launch_local(sys.argv[1:], 2))", *command)
    )
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(timeout=30) == code


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    launch_local(python("pass"), 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_callers_environment_is_left_alone() -> None:
    before = dict(os.environ)
    launch_local(python("pass"), 2)
    assert dict(os.environ) == before


def test_at_least_one_process() -> None:
    with pytest.raises(ValueError, match="nproc is 0"):
        launch_local(["true"], 0)
