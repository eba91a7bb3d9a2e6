"""What a run folder tells, whole or half-written, and what is made of it beside a queue."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.files import lock
from launch.cluster.queue import Job, parse_queue, seconds_of
from launch.cluster.status import judge, show, span, status, table
from launch.run_facts import find_runs, overrides_of, read_facts
from pretrain.survival.history import record

CONFIG = "name: {name}\nruns: runs\ntrain:\n  epochs: 10\n  batch_size: 8\ntracking:\n  log_every_steps: 10\nseed: 0\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Step 50 of 150, 15 steps an epoch, at 16 images a second."""
    folder = tmp_path / "runs" / "photos"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name="photos"))
    rows = [{"step": step, "epoch": step / 15, "loss": 1 / step, "images_per_second": 16.0} for step in (10, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "lo')
    for step in (20, 40):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / ".step-00000060.tmp").mkdir()
    return folder


def job(name: str = "12", state: str = "RUNNING", elapsed: float = 1e6, **other: Any) -> Job:
    facts = {"start": None, "limit": "1:00", "num_nodes": 1, "nodes": "n1", "partition": "p", "user": "me"}
    return Job(**({"id": name, "number": name, "state": state, "elapsed": elapsed, "reason": None} | facts | other))


def test_a_folder_is_read_up_to_where_it_is_whole(run: Path) -> None:
    facts = read_facts(run)
    assert facts.row is not None
    assert (facts.row["step"], facts.total_steps, facts.seconds_left()) == (50, 150, 50.0)
    assert facts.checkpoint is not None
    assert facts.checkpoint[0] == 40
    for cut in ("config.yaml", "history.jsonl", ".lock", "cancelled"):
        (run / cut).write_text("{\x00half")
    assert read_facts(run).total_steps is None
    assert status([run])[0].step == 50


def test_a_run_whose_history_can_not_be_read_does_not_hide_the_others(run: Path) -> None:
    (run / "history.jsonl").mkdir()  # the tests may run as root, who can read everything else
    assert [found.step for found in status([run.parent])] == [50]


def test_states_beside_a_queue(run: Path) -> None:
    record(run, "submitted", jobs=["12"], probes=["13"], log="/logs/12.out")
    waiting = job(state="PENDING", reason="Resources", start="2026-01-01T10:00:00")
    assert judge(read_facts(run), [waiting], {}, []).state == "queued"
    assert judge(read_facts(run), [waiting], {}, []).why == "12 waits: Resources, expected to start 2026-01-01 10:00:00"
    record(run, "started", step=0)
    found = judge(read_facts(run), [job(), job("13", "PENDING")], {}, ["seed=1"])
    assert (found.state, found.seconds_left, found.jobs, found.probes) == (
        "running",
        50,
        ["12 RUNNING"],
        ["13 PENDING"],
    )
    assert judge(read_facts(run), [waiting], {}, []).state == "requeued"
    assert judge(read_facts(run), [job(elapsed=0.0)], {}, []).state == "starting", "its last row is of an earlier start"
    long_ago = time.time() - 4000
    os.utime(run / "metrics.jsonl", (long_ago, long_ago))
    assert judge(read_facts(run), [job()], {}, []).why == "has reported nothing for 1:07 h"
    assert judge(read_facts(run), [job()], {}, []).state == "stalled"
    assert judge(read_facts(run), [], {"12": "NODE_FAIL"}, []).why == "job 12 ended as NODE_FAIL"
    record(run, "started", step=40)
    assert judge(read_facts(run), [], {}, []).restarts == 1
    record(run, "given_up", code=87, reason="training went wrong")
    assert (judge(read_facts(run), [], {}, []).state, judge(read_facts(run), [], {}, []).why) == (
        "failed",
        "training went wrong",
    )
    record(run, "given_up", code=85, reason="cancelled by me")
    assert judge(read_facts(run), [], {}, []).state == "cancelled"


def test_a_note_that_an_interrupted_cancel_left_is_about_its_own_jobs_only(run: Path) -> None:
    (run / "cancelled").write_text(json.dumps({"by": "me", "jobs": ["5"]}))
    record(run, "submitted", jobs=["5"])
    assert judge(read_facts(run), [job("5", "RUNNING")], {}, []).state == "stopping"
    record(run, "submitted", jobs=["6"])
    assert judge(read_facts(run), [job("6", "RUNNING")], {}, []).state != "stopping"


def test_what_ended_and_what_is_finished(run: Path) -> None:
    assert judge(read_facts(run), [], {}, []).state == "stopped"
    record(run, "started", step=0)
    record(run, "alarm", step=3, name="slow", text="26 images/s", begins=True)
    record(run, "alarm", step=4, name="collapse", text="rank 2", begins=True)
    record(run, "alarm", step=5, name="slow", text="over", begins=False)
    record(run, "ended", step=50, code=85, reason="stopped by SIGTERM")
    found = judge(read_facts(run), [], {}, [])
    assert (found.state, found.why) == ("stopped", "stopped by SIGTERM")
    assert found.alarms == ["collapse since step 4: rank 2"]
    (run / "encoder").mkdir()
    (run / "encoder" / "config.json").write_text('{"step": 150}')
    assert judge(read_facts(run), [], {}, []).state == "finished"


def test_an_array_element_goes_by_either_name(run: Path) -> None:
    record(run, "submitted", jobs=["12_1"], probes=[])
    other = job("12_0", number="12")
    assert judge(read_facts(run), [other], {}, []).state == "gone"
    assert judge(read_facts(run), [job("12_1", number="15"), other], {}, []).jobs == ["12_1 RUNNING"]


def test_a_local_run_is_alive_while_its_process_holds_it(run: Path) -> None:
    with (run / ".lock").open("a+") as file:
        assert lock(file)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None}))
        file.flush()
        found = status([run])[0]
        assert (found.state, found.why) == ("running", f"by process {os.getpid()} of this machine")
    assert status([run])[0].state == "stopped"


def test_sweeps_and_folders_of_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = run.parent
    (runs / "sweep").mkdir()
    words = ["preset.yaml", "train.epochs=5"]
    elements = [
        {"name": "photos", "arguments": [*words, "optim.lr=1e-3", "name=photos"]},
        {"name": "later", "arguments": [*words, "optim.lr=5e-4", "name=later"]},
    ]
    (runs / "sweep" / "sweep.json").write_text(json.dumps({"job": "12", "runs": elements}))
    (runs / "not a run").mkdir()
    assert find_runs([runs]) == [run]
    assert find_runs([runs / "sweep"]) == [run]
    assert overrides_of([runs]) == {run: ["optim.lr=1e-3"], runs / "later": ["optim.lr=5e-4"]}
    show([runs])
    text = capsys.readouterr().out
    assert "photos  stopped  50/150  0.02" in text
    assert "photos: optim.lr=1e-3" in text
    show([runs], as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["checkpoint_step"] == 40
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        status([Path("nowhere")])


def test_without_slurm_the_state_of_jobs_is_left_open(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(run, "submitted", jobs=["12"], probes=[])
    monkeypatch.setenv("PATH", "/nowhere")
    assert status([run])[0].state == "unknown"
    assert "the queue is not known: there is no SLURM on this machine" in capsys.readouterr().err


def test_a_loss_that_is_none_is_said(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": NaN}\n')
    found = status([run])[0]
    assert (found.loss, found.why) == (None, "its loss is nan")
    assert "7" in table([found])


def test_the_queue_is_parsed_whatever_a_reason_holds() -> None:
    line = "12_0|15|PENDING|2026-01-01T10:00:00|1-02:03:04|1:00|2||gpu|me|(a|b)"
    (found,) = parse_queue(f"{line}\ncut|line\n\n")
    assert (found.id, found.number, found.elapsed, found.reason) == ("12_0", "15", 93784.0, "(a|b)")
    assert found.waits
    assert [seconds_of(text) for text in ("3:04", "1:00:00", "INVALID")] == [184.0, 3600.0, 0.0]
    assert [span(seconds) for seconds in (45, 720, 12000, 190000)] == ["45 s", "12 min", "3:20 h", "2 d 4 h"]


def test_status_imports_no_torch(run: Path) -> None:
    code = f"import sys; from launch.cli import main\ntry: main(['status', {str(run)!r}])\nexcept SystemExit: pass\n"
    check = f"{code}print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout.splitlines()[-1] == "False", done.stderr
