"""Runs sent to a wandb server and laid out there. The server is our own and only records; no real one was asked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_data
from wandb_server import API_KEY, WandbServer, wandb_server

from launch.cli import main
from launch.dashboard.layout import as_text, layout_of
from launch.dashboard.sync import LIVE_SECONDS, complete, sync
from launch.dashboard.workspace import as_json
from pretrain.config.load import load_config, parse_config
from pretrain.survival.run_folder import alone_in, write_config
from pretrain.tracking.metrics_log import MetricsLog
from pretrain.tracking.probes import Accuracy, log_probe
from pretrain.tracking.tracker import Tracker
from pretrain.tracking.wandb_identity import identity_of

pytestmark = pytest.mark.usefixtures("patient_wandb")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A wandb server, and somebody logged in to it."""
    with wandb_server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.delenv("WANDB_SERVICE", raising=False)
        yield running


ROW = {"lr": 0.1, "images_per_second": 9.0, "rankme": 3.0, "epoch": 0.1, "loss_spikes": 0.0, "teacher_sum": 1.0}


def configured(folder: Path, name: str = "small", method: str = "mae", wandb: str = "offline", **tracking: Any) -> Path:
    """A run that is known to wandb, and has no row yet."""
    data = config_data(method, "vit", Path("shards"), folder) | {"name": name}
    data["tracking"] |= {"wandb": wandb, "project": "photos", **tracking}
    config = parse_config(data)
    write_config(folder / name, config)
    identity_of(folder / name, config)
    return folder / name


def trained(folder: Path, wandb: str = "offline", **tracking: Any) -> Path:
    """A run as a training leaves it: two lives, and a probe."""
    run = configured(folder, wandb=wandb, **tracking)
    for start, end in ((0, 4), (3, 6)):
        tracker = Tracker(run, load_config(run / "config.yaml"), start)
        for step in range(start + 1, end + 1):
            tracker.metrics(step, {"loss": 1 / step, **ROW})
        tracker.system(end, {"system/node1/cpu_percent": 50.0})
        tracker.picture(end, "masked input", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        tracker.close()
    (run / "encoder").mkdir()
    log_probe(run, 6, {"linear": Accuracy(0.7, 0.1), "knn": Accuracy(0.5, 0.1)})
    return run


def written(folder: Path, name: str = "small", method: str = "mae", **tracking: Any) -> Path:
    """The files of such a run, as much as a layout asks for, without wandb's own."""
    run = configured(folder, name, method, **tracking)
    MetricsLog(run / "metrics.jsonl", 0).write(1, {"loss": 1.0, **ROW})
    (run / "pictures").mkdir()
    (run / "pictures" / "masked-input-00000006.png").touch()
    return run


def steps(rows: list[dict[str, Any]], name: str = "loss") -> list[int]:
    return [row["step"] for row in rows if name in row]


def test_offline_files_become_one_run_of_the_server(tmp_path: Path, server: WandbServer) -> None:
    run = trained(tmp_path, group="sizes")
    assert not server.runs
    (said,) = sync([run], timeout_minutes=5)
    assert "sent 3 files" in said
    ((run_id, served),) = server.runs.items()
    assert run_id == json.loads((run / "wandb.json").read_text())["id"]
    assert steps(served.history) == [1, 2, 3, 4, 5, 6]
    assert [row["_step"] for row in served.history] == list(range(len(served.history)))
    assert [row["probe/linear"] for row in served.history if "probe/linear" in row] == [0.7]
    assert (served.summary["loss"], served.summary["probe/linear"]) == (1 / 6, 0.7)
    assert (served.group, served.job_type, served.complete) == ("sizes", "pretrain", True)
    metrics = served.config["_wandb"]["value"]["m"]  # wandb's own short form: 1 is a name, 5 the number of its axis
    axes = {metric["1"]: metrics[metric["5"] - 1]["1"] for metric in metrics if "5" in metric}
    assert axes["probe/linear"] == "probe/step"
    before = len(served.history)
    assert "nothing to send" in sync([run], timeout_minutes=5)[0]
    assert len(served.history) == before


def test_a_run_online_is_continued_where_the_server_has_it(tmp_path: Path, server: WandbServer) -> None:
    run = trained(tmp_path, wandb="online")
    ((_, served),) = server.runs.items()
    assert steps(served.history) == [1, 2, 3, 4, 5, 6]
    assert served.summary["probe/linear"] == 0.7
    assert json.loads((run / "wandb.json").read_text())["url"].startswith(server.url)


def test_rows_that_wandb_lost_at_the_end_are_sent_with_the_rest(tmp_path: Path, server: WandbServer) -> None:
    run = trained(tmp_path)
    MetricsLog(run / "metrics.jsonl", 6).write(7, {"loss": 0.1})
    assert "with 1 row that wandb had lost" in sync([run], timeout_minutes=5)[0]
    ((_, served),) = server.runs.items()
    assert steps(served.history) == [1, 2, 3, 4, 5, 6, 7]
    assert complete(run) == 0


def test_files_that_are_written_to_wait(tmp_path: Path, server: WandbServer) -> None:
    run = trained(tmp_path)
    newest = sorted(run.glob("wandb/offline-run-*/*.wandb"))[-1]
    newest.write_bytes(newest.read_bytes()[:-20])  # no end in it
    assert "still written to: 1 file" in sync([run], timeout_minutes=5)[0]
    long_ago = time.time() - LIVE_SECONDS - 1
    os.utime(newest, (long_ago, long_ago))
    assert "sent 1 file" in sync([run], timeout_minutes=5)[0]


def test_a_run_that_goes_on_is_left_alone_however_old_its_files_are(tmp_path: Path, server: WandbServer) -> None:
    run = trained(tmp_path)
    newest = sorted(run.glob("wandb/offline-run-*/*.wandb"))[-1]
    newest.write_bytes(newest.read_bytes()[:-20])
    long_ago = time.time() - LIVE_SECONDS - 1  # wandb's service writes to the disk only now and then
    os.utime(newest, (long_ago, long_ago))
    MetricsLog(run / "metrics.jsonl", 6).write(7, {"loss": 0.1})  # of the present life
    with alone_in(run):
        assert "sent 2 files; still written to: 1 file" in sync([run], timeout_minutes=5)[0]
    assert "sent 2 files, with 1 row that wandb had lost" in sync([run], timeout_minutes=5)[0]
    ((_, served),) = server.runs.items()
    assert 7 in steps(served.history)


def test_what_a_server_never_got_of_a_run_online_is_sent_and_nothing_twice(tmp_path: Path, server: WandbServer) -> None:
    run = trained(tmp_path, wandb="online")
    ((_, served),) = server.runs.items()
    with alone_in(run):
        assert "nothing to send; it goes on" in sync([run], timeout_minutes=5)[0]
    served.history = [row for row in served.history if row.get("step", 0) <= 4 and "probe/step" not in row]
    served.summary |= {"step": 4}
    assert "sent 4 rows that wandb had lost" in sync([run], timeout_minutes=5)[0]
    assert steps(served.history) == [1, 2, 3, 4, 5, 6]
    assert "nothing to send" in sync([run], timeout_minutes=5)[0]
    assert steps(served.history) == [1, 2, 3, 4, 5, 6]


def test_a_dashboard_is_laid_out_and_then_brought_up_to_date(
    tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path, group="sizes")
    main_of("dashboard", str(run))
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("lab", "photos", "sizes")
    assert view["type"] == "project-view"
    spec = json.loads(view["spec"])
    sections = {section["name"]: section["panels"] for section in spec["section"]["panelBankConfig"]["sections"]}
    assert list(sections) == [
        "Loss and schedules",
        "Speed and memory",
        "Diagnostics and collapse",
        "Probes",
        "Machines, node by node",
        "Pictures",
    ]
    probes = [panel["config"] for panel in sections["Probes"]]
    assert probes[1]["metrics"] == ["probe/linear", "probe/linear_low", "probe/linear_high"]
    assert probes[0]["xAxis"] == "probe/step"
    assert sections["Machines, node by node"][0]["config"]["metricRegex"] == "system/.*/cpu_percent"
    assert sections["Pictures"][0]["config"]["mediaKeys"] == ["pictures/masked-input"]
    assert spec["section"]["settings"]["xAxis"] == "step"
    (condition,) = spec["section"]["runSets"][0]["filters"]["filters"]
    assert (condition["key"]["name"], condition["value"]) == ("group", "sizes")
    assert "workspace: http" in capsys.readouterr().out
    main_of("dashboard", str(run))
    again = server.views[1]
    assert (again["id"], again["name"]) == ("view-id", view["name"])


def main_of(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_dry_run_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = written(tmp_path, "one"), written(tmp_path, "two", "dino")
    main_of("dashboard", str(one), str(two), "--dry-run")
    shown = capsys.readouterr().out
    assert "workspace 'one and 1 more' in (your entity)/photos" in shown
    assert "loss by method" in shown
    main_of("dashboard", str(one), "--dry-run", "--json", "--entity", "lab")
    assert json.loads(capsys.readouterr().out)["section"]["panelBankConfig"]["sections"]
    layout = layout_of([one, two])
    assert "lines    rankme: rankme over step" in as_text(layout)
    shown = {section.name: [panel.title for panel in section.panels] for section in layout.sections}
    assert shown["Loss and schedules"] == ["loss by method", "loss", "lr"]
    assert shown["Diagnostics and collapse"] == ["rankme", "loss_spikes"]
    assert json.loads((one / "wandb.json").read_text())["id"] in as_json(layout)


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    assert "nobody is logged in" in refused(capsys, "dashboard", str(run))
    assert "nobody is logged in" in refused(capsys, "dashboard", str(run), "--sync")
    assert "is no run folder" in refused(capsys, "dashboard", str(tmp_path))
    untracked = tmp_path / "untracked"
    untracked.mkdir()
    (untracked / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "has no wandb run" in refused(capsys, "dashboard", str(untracked))
    elsewhere = written(tmp_path, "elsewhere", entity="other")
    assert "several projects" in refused(capsys, "dashboard", str(run), str(elsewhere))
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    assert "pip install '.[dashboard]'" in refused(capsys, "dashboard", str(run))


def test_a_server_that_refuses_or_is_away_is_said(
    tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = written(tmp_path)
    server.refuses = True
    assert "wandb did not take the workspace" in refused(capsys, "dashboard", str(run))
