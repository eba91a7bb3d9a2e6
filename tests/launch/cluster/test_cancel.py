"""Cancelling what runs on this machine without SLURM; tests/cluster does it to jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster.cancel import NotCancelledError, cancel, runs_of
from pretrain.survival.history import record

RUN = """
import json, os, pathlib, signal, socket, sys, time
from data_pipelines.files import lock
run, stubborn = pathlib.Path(sys.argv[1]), len(sys.argv) > 2
def stop(number, frame):
    if not stubborn:
        (run / "checkpoints" / "step-00000007").mkdir(parents=True)
        os._exit(85)
signal.signal(signal.SIGTERM, stop)
file = (run / ".lock").open("a+")
assert lock(file)
file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None}))
file.flush()
print("there", flush=True)
time.sleep(120)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "photos"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: photos\n")
    return folder


@pytest.fixture
def process(run: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    more = ["stubborn"] if getattr(request, "param", "") == "stubborn" else []
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(run), *more], stdout=subprocess.PIPE, text=True, cwd=root
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "there\n"
        yield started
        started.kill()


def test_a_local_run_is_asked_for_a_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    said: list[str] = []
    cancel([run], now=False, wait=60, say=said.append)
    assert process.wait() == 85
    assert said == [
        f"{run}: asked process {process.pid} to write a checkpoint",
        f"{run}: over, with the checkpoint of step 7; the same command continues from there",
    ]
    with pytest.raises(ValueError, match="has neither a job in the queue nor a process here"):
        cancel([run], now=False, wait=60, say=said.append)


@pytest.mark.parametrize("process", ["stubborn"], indirect=True)
def test_one_that_does_not_end_is_said_and_ended_by_now(run: Path, process: subprocess.Popen[str]) -> None:
    said: list[str] = []
    with pytest.raises(NotCancelledError, match="not over after 0 s"):
        cancel([run], now=False, wait=0, say=said.append)
    assert process.poll() is None
    cancel([run], now=True, wait=60, say=said.append)
    assert process.wait() == -9
    assert said[-1] == f"{run}: over, without a checkpoint"


def test_what_cannot_be_cancelled_says_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        runs_of(Path("nowhere"))
    with pytest.raises(ValueError, match="is no run; it holds runs, such as photos"):
        runs_of(run.parent)
    monkeypatch.chdir(run.parents[1])
    assert runs_of(Path("photos")) == [Path("runs/photos")]
    (run / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": None}))
    with pytest.raises(ValueError, match="last trained by process 1 of elsewhere"):
        cancel([run], now=False, wait=1, say=print)


def test_a_sweep_stands_for_its_runs(run: Path) -> None:
    sweep = run.parent / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps({"job": "1", "runs": [{"name": "photos"}, {"name": "not begun"}]}))
    assert runs_of(sweep) == [run]


def test_another_users_job_is_left_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue's answer is the one thing that is made up here: a cluster of one user has no other's jobs."""
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\necho '12|12|RUNNING|N/A|1:00|1:00|1|n1|p|somebody|None'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("os.getuid", lambda: 1234567)
    record(run, "submitted", jobs=["12"], probes=[])
    with pytest.raises(PermissionError, match=r"job 12 of .* is somebody's; only they can end it"):
        cancel([run], now=False, wait=1, say=print)
    assert not (run / "cancelled").exists()
