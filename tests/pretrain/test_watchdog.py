"""Programs that hang in the ways that ranks do, each watched with limits of a fraction of a second."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config.load import parse_config
from pretrain.survival.heartbeat import Heartbeat
from pretrain.survival.history import read_history
from pretrain.survival.stopping import EXIT_HUNG
from pretrain.survival.watchdog import FEW_STEPS, Limits, Watchdog

#: `RUN RANK WORLD HOW`: twenty-four quick steps, in the twentieth of which HOW happens on rank 0.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from pretrain.survival.watchdog import Limits, Watchdog

run, rank, world, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
limits = Limits(longest=20, factor=2, floor=1.0, grace=3.0, tick=0.05, beat=0.2)

def next_batch(number):
    if number == 20 and rank == 0 and how == "loader":
        threading.Event().wait()

def compute(number):
    if number == 20 and rank == 0 and how == "lock":
        ctypes.PyDLL(None).sleep(300)  # as a library that forgets to give Python's lock back
    if number == 20 and rank == 0 and how == "stop":
        print("stopping", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    if number == 20 and how == "slow":
        time.sleep(0.6)
    if number == 20 and rank and how in ("loader", "stop"):
        hung_in_a_collective(number)

exec(compile("def hung_in_a_collective(number): time.sleep(300)", "torch/distributed/collectives.py", "exec"))

(run / f"here-{rank}").touch()
while len(list(run.glob("here-*"))) < world:
    time.sleep(0.01)
with Watchdog(None if how == "off" else limits, run, rank, world) as watchdog:
    for number in range(1, 25):
        watchdog.step(number)
        next_batch(number)
        watchdog.phase("step")
        time.sleep(0.03)
        compute(number)
        if how == "checkpoint" and number == 21:
            with watchdog.allowing("checkpoint"):
                time.sleep(2.5)
        if how == "saves" and number == 21:
            if rank == 0:
                with watchdog.allowing("checkpoint"):
                    time.sleep(4)
                (run / "saved").touch()
            while not (run / "saved").exists():
                time.sleep(0.01)
        if how == "forever" and number == 21:
            with watchdog.allowing("checkpoint", 0.5):
                time.sleep(300)
print("finished")
"""


def start(run: Path, how: str, rank: int = 0, world: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run), str(rank), str(world), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def end(*started: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    try:
        told = [process.communicate(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(started, told, strict=True)]


def test_a_hung_rank_shows_its_stacks_and_ends(tmp_path: Path) -> None:
    (code, _, err), *_ = end(start(tmp_path, "loader"))
    assert code == EXIT_HUNG
    assert "step 20 has taken 1 s so far, the median is 0.0" in err
    assert "in `data`" in err
    stacks = (tmp_path / "stacks" / "rank-00000-step-20.txt").read_text()
    for told in (err, stacks):
        assert "in next_batch" in told
    (ended,) = read_history(tmp_path)
    assert (ended["event"], ended["code"], ended["step"]) == ("ended", EXIT_HUNG, 19)
    assert ended["reason"].startswith("hung: step 20")


def test_all_ranks_report_and_name_the_one_they_wait_for(tmp_path: Path) -> None:
    ranks = end(*(start(tmp_path, "loader", rank, 3) for rank in range(3)))
    assert [code for code, _, _ in ranks] == [EXIT_HUNG] * 3
    for rank, (_, _, err) in enumerate(ranks):
        assert f"rank {rank} of 3: step 20 has taken" in err
        line = [line for line in err.splitlines() if "others wait for it" in line][-1]
        assert re.match(r"rank 0 on \S+ is in `data` of step 20 for \d+ s", line)
        assert (tmp_path / "stacks" / f"rank-{rank:05d}-step-20.txt").is_file()
    (ended,) = read_history(tmp_path)  # one of them writes it
    assert "hung: rank 0 on" in ended["reason"]


def test_a_stopped_rank_is_named_by_the_others_and_killed(tmp_path: Path) -> None:
    ranks = end(*(start(tmp_path, "stop", rank, 2) for rank in range(2)))
    assert [code for code, _, _ in ranks] == [-signal.SIGKILL, EXIT_HUNG]
    assert re.search(r"rank 0 on .* gives no sign of life, last seen in `\w+` of step \d", ranks[1][2])
    assert "stopped; it is killed" in ranks[0][2]
    (ended,) = read_history(tmp_path)
    assert "rank 0 on" in ended["reason"]


def test_a_rank_that_keeps_pythons_lock_shows_its_stacks_and_is_killed(tmp_path: Path) -> None:
    (code, _, err), *_ = end(start(tmp_path, "lock"))
    assert code == -signal.SIGKILL
    assert "code that does not let Python run" in err
    assert "in compute" in err


def test_something_other_than_a_step_has_its_own_limit(tmp_path: Path) -> None:
    (code, _, err), *_ = end(start(tmp_path, "forever"))
    assert code == EXIT_HUNG
    assert "in `checkpoint`" in err


@pytest.mark.parametrize("how", ["fine", "checkpoint", "off"])
def test_one_that_goes_on_is_left_alone(tmp_path: Path, how: str) -> None:
    assert end(start(tmp_path, how)) == [(0, "finished\n", "")]
    assert [path.name for path in tmp_path.iterdir()] == ["here-0"]


def test_who_waits_for_a_rank_that_saves_is_left_alone(tmp_path: Path) -> None:
    ranks = end(*(start(tmp_path, "saves", rank, 2) for rank in range(2)))
    assert [(code, out) for code, out, _ in ranks] == [(0, "finished\n")] * 2


def test_a_slow_step_is_warned_of(tmp_path: Path) -> None:
    (code, out, err), *_ = end(start(tmp_path, "slow"))
    assert (code, out) == (0, "finished\n")
    assert "the job ends when it has taken 1 s" in err
    assert "Current thread" not in err


def test_the_stacks_can_be_asked_for(tmp_path: Path) -> None:
    process = start(tmp_path, "checkpoint")
    while not (tmp_path / "heartbeats").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGQUIT)
    ((code, out, err),) = end(process)
    assert (code, out) == (0, "finished\n")
    assert "(most recent call first)" in err


def test_a_step_may_take_many_times_the_usual_but_not_the_first_ones() -> None:
    limits = Limits(longest=1000, factor=10, floor=5)
    watchdog = Watchdog(limits)
    for number in range(1, FEW_STEPS + 1):
        watchdog.step(number)
        assert watchdog.step_limit() == 1000
    watchdog._durations.extend([2.0] * 100)
    assert watchdog.step_limit() == pytest.approx(20)
    watchdog._durations.extend([900.0] * 30)  # a few slow ones do not move the median
    assert watchdog.step_limit() == pytest.approx(20)
    watchdog._durations.extend([0.01] * 101)
    assert watchdog.step_limit() == 5
    watchdog.limits = replace(limits, longest=3)
    assert watchdog.step_limit() == 3


def test_what_a_configuration_says(mae_data: dict[str, object]) -> None:
    engine = parse_config(mae_data).engine
    limits = Limits.of(engine, 2)
    assert limits is not None
    assert (limits.longest, limits.factor, limits.floor) == (1800, 20, 180)
    many = Limits.of(engine, 1000)
    assert many is not None
    assert (many.beat, many.grace) == (50, 120)
    assert Limits.of(replace(engine, hang_seconds=None), 2) is None


def test_time_that_a_slow_disk_takes_is_no_suspension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a hang beside a slow file system would take many times its limit to be seen."""
    beats: list[float] = []

    def beat(*_: object) -> None:
        time.sleep(1.5)
        beats.append(time.monotonic())

    monkeypatch.setattr(Heartbeat, "beat", beat)
    with Watchdog(Limits(tick=0.01, beat=0.0), tmp_path) as watchdog:
        while len(beats) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        assert watchdog._lost < 1.5
