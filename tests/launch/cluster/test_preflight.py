"""Preflight of one process and of several on this machine; tests/cluster has the nodes of a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import config_data, write_shards

from launch.cluster import checks
from launch.cluster.checks import checksum_of, code_checksum, look, spread, versions
from launch.cluster.preflight import main
from launch.cluster.rendezvous import Report
from launch.ranks import Ranks, tasks_of_nodes
from pretrain.config.load import load_config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards, 40)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config_data("mae", "vit", shards, tmp_path / "runs")))
    return path


def looked(preset: Path, *overrides: str) -> Report:
    config = load_config(str(preset), list(overrides))
    report = Report("start", 0, "here", 0, 1, "nonce")
    look(config, Path(config.runs) / config.name, Ranks(0, 0, 1, "127.0.0.1", None), report, lambda phase: None)
    return report


def test_a_healthy_node_has_no_troubles(preset: Path) -> None:
    report = looked(preset)
    assert [trouble for trouble in report.troubles if trouble[1] != "warn"] == []
    assert report.facts["python"] == versions()["python"]
    assert report.facts["torch"]
    assert {"shards", "code", "room in the run folder", "open files"} <= set(report.facts)
    assert {"versions", "disk", "shards", "reading samples"} <= set(report.seconds)


def test_each_trouble_is_found_and_none_hides_the_others(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    looked(preset)  # the index is there by now
    shards[1].unlink()
    report = looked(preset, "data.train=" + str(tmp_path / "shards" / "train-{000000..000001}.tar"))
    found = {check: text for check, level, text in report.troubles if level == "bad"}
    assert set(found) == {"disk", "shards"}
    assert "train-000001.tar" in found["shards"]


def test_room_for_a_checkpoint(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "runs" / "mae-vit" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.pt").write_bytes(b"0" * 5000)
    monkeypatch.setattr(checks, "free_bytes", lambda folder: 4000)
    (text,) = [text for check, level, text in looked(preset).troubles if check == "disk" and "checkpoint" in text]
    assert "3.9 KiB free" in text
    assert "a checkpoint takes 4.9 KiB" in text


def test_a_preflight_of_one_process(preset: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "preflight", str(preset)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 tasks on 1 node" in done.stdout
    result = json.loads((tmp_path / "runs" / "mae-vit" / "preflight" / "local" / "result.json").read_text())
    assert result["reports"][0]["reduce"]["sum"] == 1.0


def test_a_preflight_of_two_processes_of_this_machine(preset: Path) -> None:
    command = [sys.executable, "-m", "launch", "preflight", str(preset), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gloo, sum 3 over 2 ranks" in done.stdout


def test_settings_that_are_wrong_are_the_users(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(preset), "train.stepz=3"]) == 2
    assert "stepz" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_no_verdict_is_no_permission(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--result", str(preset)]) == 1
    assert "left no verdict" in capsys.readouterr().err


def test_the_codes_checksum_changes_with_the_code_and_not_with_its_place(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        (tmp_path / copy / "native").mkdir(parents=True)
        (tmp_path / copy / "train.py").write_text("x = 1\n")
        (tmp_path / copy / "native" / "crop.c").write_text("int x;\n")
        (tmp_path / copy / "train.pyc").write_text(copy)
    one, two = ({"pretrain": tmp_path / copy} for copy in ("one", "two"))
    assert checksum_of(one) == checksum_of(two)
    (tmp_path / "two" / "native" / "crop.c").write_text("int y;\n")
    assert checksum_of(one) != checksum_of(two)
    assert len(code_checksum()) == 12


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 1, 2]), (8, list(range(8)))])
def test_samples_are_spread(count: int, expected: list[int]) -> None:
    assert spread(count) == expected
    assert (spread(1000)[0], spread(1000)[-1], len(spread(1000))) == (0, 999, 8)


def test_tasks_of_nodes() -> None:
    step = {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "4"}
    assert tasks_of_nodes(step) == {"n1": 4}
    assert tasks_of_nodes({}) is None
