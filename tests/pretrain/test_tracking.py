"""One wandb run per training, whatever happens to its processes and to wandb; files that outlive full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_data
from tracked import tracked_run

from pretrain.config import Config
from pretrain.config.load import parse_config
from pretrain.survival.run_folder import write_config
from pretrain.tracking import metrics_log, wandb_run
from pretrain.tracking.console import say
from pretrain.tracking.metrics_log import MetricsLog, read_rows
from pretrain.tracking.probes import Accuracy, log_lone_probe, log_probe, log_tables
from pretrain.tracking.tracker import Tracker
from pretrain.tracking.wandb_identity import identity_of
from pretrain.tracking.wandb_run import WandbRun

pytestmark = pytest.mark.usefixtures("patient_wandb")
ROOT = Path(__file__).parents[2]


def offline(folder: Path, **tracking: Any) -> Config:
    data = config_data("mae", "vit", Path("shards"), folder)
    data["tracking"] |= {"wandb": "offline", **tracking}
    config = parse_config(data)
    write_config(folder / config.name, config)
    return config


def live(config: Config, start: int, end: int) -> None:
    """A life of a run: resumed after step `start`, ended after `end`."""
    tracker = Tracker(Path(config.runs) / config.name, config, start)
    for step in range(start + 1, end + 1):
        tracker.metrics(step, {"loss": 1 / step})
        tracker.system(step, {"system/node1/cpu_percent": step})
    tracker.picture(end, "masked input (what it sees)", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    tracker.close()


def script(config: Config, body: str) -> str:
    """A process that has a tracker; `body` sees it as `tracker`, and `core()`, wandb's service."""
    return f"""
import os, signal, sys, time, psutil
from pathlib import Path
from pretrain.config.load import load_config
from pretrain.tracking import wandb_run
from pretrain.tracking.tracker import Tracker
wandb_run.FINISH_SECONDS, wandb_run.INIT_SECONDS = 120.0, 120  # the machine may have other work
run = Path({str(Path(config.runs) / config.name)!r})
def core():
    for _ in range(600):
        for child in psutil.Process().children():
            if child.name().startswith("wandb-core") and list(run.glob("wandb/*/*.wandb")):
                return child
        time.sleep(.1)
def taken():
    while tracker.wandb._waiting.qsize() or tracker.wandb._interrupted:
        time.sleep(.05)
tracker = Tracker(run, load_config(run / "config.yaml"), 0)
for step in range(1, 6):
    tracker.metrics(step, {{"loss": 1 / step}})
{body}
"""


def without_service() -> dict[str, str]:
    """The environment of another job: wandb's service of this process is none of its business."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


def process(config: Config, body: str, expect: int = 0) -> str:
    command = [sys.executable, "-c", script(config, body)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=without_service(), check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_training_is_one_run_over_all_its_lives(tmp_path: Path) -> None:
    config = offline(tmp_path, group="sizes", job_type="sweep", tags=["a"], project="photos", notes="why", entity="lab")
    live(config, 0, 6)
    live(config, 4, 9)  # preempted after step 6, from the checkpoint of step 4
    tracked = tracked_run(tmp_path / config.name)
    assert len(tracked.files) == 2
    assert len(tracked.ids) == 1
    assert tracked.column("loss") == {step: 1 / step for step in range(1, 10)}
    assert tracked.column("system/node1/cpu_percent") == {step: step for step in range(1, 10)}
    assert sorted(tracked.column("pictures/masked-input")) == [6, 9]
    for file, last in zip(tracked.files, (6, 9), strict=True):
        assert (file.group, file.job_type, file.tags, file.project) == ("sizes", "sweep", ["a"], "photos")
        assert (file.entity, file.notes, file.name) == ("lab", "why", config.name)
        assert file.config["optim"]["lr"] == config.optim.lr
        assert (file.summary["loss"], file.ended) == (1 / last, True)
        assert {"name": "loss", "step_metric": "step"} in file.metrics
    stored = json.loads((tmp_path / config.name / "wandb.json").read_text())
    assert {stored["id"]} == tracked.ids
    assert [row["step"] for row in read_rows(tmp_path / config.name / "metrics.jsonl")] == list(range(1, 10))


def test_rows_that_a_killed_process_lost_come_with_the_next_life(tmp_path: Path) -> None:
    config = offline(tmp_path)
    process(config, "child = core(); taken(); child.kill(); os.kill(os.getpid(), signal.SIGKILL)", expect=-9)
    folder = tmp_path / config.name
    assert tracked_run(folder).column("loss") == {}, "wandb has become quicker to write: this test shows nothing"
    live(config, 4, 8)
    assert tracked_run(folder).column("loss") == {step: 1 / step for step in range(1, 9)}


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_when_wandbs_service_dies_another_takes_over(tmp_path: Path, number: str) -> None:
    config = offline(tmp_path)
    told = process(
        config,
        f"""
child = core(); taken(); child.send_signal(signal.{number}); child.wait(20)
for step in range(6, 11):
    tracker.metrics(step, {{"loss": 1 / step}})
tracker.close()
""",
    )
    assert "wandb is lost" in told
    tracked = tracked_run(tmp_path / config.name)
    assert tracked.column("loss") == {step: 1 / step for step in range(1, 11)}
    assert len(tracked.files) == 2
    assert len(tracked.ids) == 1


def test_a_service_that_hangs_stalls_nobody(tmp_path: Path) -> None:
    config = offline(tmp_path)
    told = process(
        config,
        """
child = core(); taken(); child.suspend()
wandb_run.FINISH_SECONDS = 2.0
start = time.monotonic()
for step in range(6, 20_006):
    tracker.wandb.log(step, {"loss": 1 / step, "text": "x" * 200})
print("LOGGED", time.monotonic() - start)
tracker.metrics(20_006, {"loss": 3})
tracker.close()
print("CLOSED", time.monotonic() - start)
""",
    )
    assert "wandb has taken none" in told
    assert "did not finish" in told
    closed = float(told.split("CLOSED ")[1].split()[0])
    assert closed < 60
    assert [row["step"] for row in read_rows(tmp_path / config.name / "metrics.jsonl")] == [1, 2, 3, 4, 5, 20_006]


def test_a_run_that_nobody_waits_for_starts_no_other_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, ended = threading.Event(), threading.Event()
    tries = []

    def hangs(*_: object) -> None:
        tries.append(1)
        begun.set()
        ended.wait(60)
        raise ConnectionError("its service was killed")

    monkeypatch.setattr(wandb_run, "_init", hangs)
    monkeypatch.setattr(wandb_run, "_end_own_service", ended.set)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0.1)
    config = offline(tmp_path)
    run = WandbRun(identity_of(tmp_path / config.name, config))
    assert begun.wait(60)
    run.finish()
    run._thread.join(60)
    assert len(tries) == 1
    assert "can't start" not in capsys.readouterr().out


def test_a_dead_service_of_the_batch_script_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SERVICE", f"3-1-unix-{tmp_path}/gone")
    config = offline(tmp_path)
    live(config, 0, 3)
    assert tracked_run(tmp_path / config.name).column("loss") == {1: 1.0, 2: 0.5, 3: 1 / 3}


def test_secrets_do_not_get_into_wandb(tmp_path: Path) -> None:
    data = config_data("mae", "vit", Path("shards"), tmp_path)
    data["data"]["train"] = "https://me:hunter2@host/train-{000..009}.tar"
    data["tracking"]["wandb"] = "offline"
    config = parse_config(data)
    write_config(tmp_path / config.name, config)
    code = script(config, "tracker.close()")
    subprocess.run(
        [sys.executable, "-c", code, "data.train=https://me:hunter2@host"], cwd=ROOT, check=True, timeout=300
    )
    (tracked,) = tracked_run(tmp_path / config.name).files
    assert "host/train" in tracked.config["data"]["train"]
    holding = [
        path for path in (tmp_path / config.name).rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()
    ]
    assert holding == []


SCORES = {"knn": Accuracy(0.5, 0.02), "linear": Accuracy(0.6, 0.01)}


def test_probes_go_into_the_run_while_it_trains(tmp_path: Path) -> None:
    config = offline(tmp_path, group="sizes")
    folder = tmp_path / config.name
    tracker = Tracker(folder, config, 0)
    tracker.metrics(1, {"loss": 3.0})
    code = "from test_tracking import SCORES, Path, log_probe; log_probe(Path(sys.argv[1]), 1, SCORES)"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300, env=without_service())
    tracker.metrics(2, {"loss": 2.0})
    tracker.close()
    log_probe(folder, 2, {**SCORES, "linear": Accuracy(0.7, 0.01)})
    tracked = tracked_run(folder)
    assert len(tracked.files) == 3
    assert len(tracked.ids) == 1
    assert tracked.column("loss") == {1: 3.0, 2: 2.0}
    assert tracked.column("probe/linear") == {1: 0.6, 2: 0.7}
    assert tracked.column("probe/linear_low") == pytest.approx({1: 0.59, 2: 0.69})
    assert tracked.column("probe/knn_high") == pytest.approx({1: 0.52, 2: 0.52})
    last = tracked.files[-1]  # what a server shows after all are sent
    assert (last.summary["loss"], last.summary["probe/linear"], last.group) == (2.0, 0.7, "sizes")
    assert last.config == tracked.files[0].config
    live(config, 2, 4)
    assert tracked_run(folder).files[-1].summary["probe/linear"] == 0.7


def test_a_probe_that_wandb_lost_comes_with_the_next_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = offline(tmp_path)
    folder = tmp_path / config.name
    live(config, 0, 2)
    with monkeypatch.context() as lost:
        lost.setattr(WandbRun, "row", lambda *_: None)
        log_probe(folder, 2, SCORES)
    log_probe(folder, 1, SCORES)
    live(config, 2, 4)
    live(config, 4, 5)
    tracked = tracked_run(folder)
    assert tracked.column("probe/linear") == {1: 0.6, 2: 0.6}
    assert sorted(tracked.column("loss")) == [1, 2, 3, 4, 5]


def test_the_probe_of_an_encoder_from_elsewhere_is_a_run_of_its_own(tmp_path: Path) -> None:
    log_lone_probe(tmp_path / "probes", "timm:vit", SCORES, {"data": "shards"}, "photos", "baselines")
    log_lone_probe(tmp_path / "probes", "timm:swin", SCORES, {"data": "shards"}, "photos", "baselines")
    tracked = tracked_run(tmp_path / "probes")
    assert sorted((file.name, file.job_type, file.group) for file in tracked.files) == [
        ("timm:swin", "probe", "baselines"),
        ("timm:vit", "probe", "baselines"),
    ]
    assert len(tracked.ids) == 2
    assert not (tmp_path / "probes" / "wandb.json").exists()


def test_a_run_that_tracks_nothing_has_no_probes_in_wandb(tmp_path: Path) -> None:
    config = offline(tmp_path, wandb="disabled")
    live(config, 0, 2)
    log_probe(tmp_path / config.name, 2, SCORES)
    assert not (tmp_path / config.name / "wandb").exists()
    assert len(list(read_rows(tmp_path / config.name / "metrics.jsonl"))) == 2


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As on a full disk, a write past `size` bytes is done in part, and then fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(1, {"loss": 1.0})
    with no_file_beyond(40):
        for step in range(2, 30):
            log.write(step, {"loss": 1 / step})
        assert [row["step"] for row in read_rows(log.path)] == [1]
        assert log.num_held == 28
    assert capsys.readouterr().out.count("can't be written") == 1
    log.write(30, {"loss": 0.0})
    assert [row["step"] for row in read_rows(log.path)] == list(range(1, 31))
    assert log.path.read_text().count("\n") == 30
    assert "29 rows caught up" in capsys.readouterr().out


def test_a_run_starts_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = offline(tmp_path)
    with no_file_beyond(0):
        identity = identity_of(tmp_path / config.name, config)
    assert identity.id
    assert "may begin another wandb run" in capsys.readouterr().out


def test_rows_that_are_lost_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_log, "MOST_HELD", 5)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with no_file_beyond(0):
        for step in range(1, 9):
            log.write(step, {})
        log.close()
    assert "lacks 8 rows" in capsys.readouterr().out
    log.close()
    assert [row["step"] for row in read_rows(log.path)] == [4, 5, 6, 7, 8]


def test_lines_go_out_later_when_the_log_file_of_a_job_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "job.out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with no_file_beyond(4):
            say("one line")
            say("another")
        say("the third")
    assert (tmp_path / "job.out").read_text() == "one line\nanother\nthe third\n"


def test_a_cut_row_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": null}\n{"step": 3, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    log = MetricsLog(path, 1)
    log.write(2, {})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tables_of_probes_join_the_run_and_come_with_the_next_life_if_they_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = offline(tmp_path)
    folder = tmp_path / config.name
    live(config, 0, 1)
    tables_of_step = {"probes": (("what", "measure", "number"), [("step 1", "linear", 0.6), ("a", "b", None)])}
    picture = folder / "pictures" / "segmentation-00000001.png"
    rows: list[dict[str, Any]] = []
    with monkeypatch.context() as lost:
        lost.setattr(WandbRun, "row", lambda _, row: rows.append(row))
        log_tables(folder, 1, tables_of_step)
        log_probe(folder, 1, SCORES, tables_of_step, [picture])
    assert rows[0] == rows[2]
    assert rows[3] == {"step": 1, "pictures/segmentation": picture}
    live(config, 1, 2)
    live(config, 2, 3)
    tables = [path for path in folder.rglob("*.table.json") if "tables" in path.parts]
    assert len(tables) == 1
    assert json.loads(tables[0].read_text())["data"] == [["step 1", "linear", 0.6], ["a", "b", None]]
    assert sorted(tracked_run(folder).column("loss")) == [1, 2, 3]
