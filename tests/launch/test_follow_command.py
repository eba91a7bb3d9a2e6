from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from eval.protocol import Protocol
from launch import follow_command
from pretrain.survival.history import record


def checkpoint(run: Path, step: int, milestone: bool) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": {"step": step, "milestone": milestone}}))
    return folder


def result(run: Path, step: int, data: str) -> None:
    (run / "eval").mkdir(exist_ok=True)
    digest = "".join(char for char in data if char.isalnum())
    (run / "eval" / f"probe-{step}-{digest}.json").write_text(json.dumps({"data": {"train": {"spec": data}}}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, milestone in ((10, True), (15, False), (20, True)):
        checkpoint(tmp_path, step, milestone)
    (tmp_path / "checkpoints" / "step-00000030").mkdir()  # half there
    return tmp_path


def test_every_milestone_is_probed_once_and_those_that_come_meanwhile(run: Path) -> None:
    result(run, 10, "shards")
    record(run, "given_up", code=1, reason="a crash")
    seen = []

    def measure(target: str) -> None:
        seen.append(Path(target).name)
        result(run, int(Path(target).name[5:]), "shards")
        if len(seen) == 1:
            checkpoint(run, 40, milestone=True)

    assert follow_command.follow_run(run, "shards", measure, poll_seconds=0) == 2
    assert seen == ["step-00000020", "step-00000040"]
    assert follow_command.follow_run(run, "other", seen.append, poll_seconds=0) == 3


def test_a_result_without_a_probe_or_with_other_groups_does_not_count(run: Path) -> None:
    (asked, shorter, more) = (
        Protocol.of(also, (0, 1), {"epochs": epochs}).as_json()
        for also, epochs in (((), 9), ((), 8), (("logistic",), 9))
    )
    done = {"data": {"train": {"spec": "shards"}}, "protocol": {**asked, "pixel_size": 32}}
    (run / "eval").mkdir()
    (run / "eval" / "probe-10-old.json").write_text(json.dumps(done))
    checkpoint = run / "checkpoints" / "step-00000010"
    counts = partial(follow_command.has_result, run, checkpoint, "shards")
    assert counts(asked, None)
    assert not counts(shorter, None)
    assert not counts(more, None)
    assert not counts(asked, "patient")


def test_one_that_cannot_be_probed_does_not_hold_up_the_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run, "given_up", code=1, reason="a crash")

    def measure(target: str) -> None:
        if target.endswith("10"):
            raise ValueError("no labels")

    assert follow_command.follow_run(run, "shards", measure, poll_seconds=0) == 1
    assert "step-00000010 can't be probed: no labels" in capsys.readouterr().out


def test_without_an_answer_of_slurm_the_history_and_the_encoder_tell(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    record(run, "submitted", jobs=["7"])
    assert not follow_command.is_over(run)
    record(run, "given_up", code=1, reason="a crash")
    assert follow_command.is_over(run)
    record(run, "submitted", jobs=["8"])
    assert not follow_command.is_over(run)
    (run / "encoder").mkdir()
    (run / "encoder" / "config.json").touch()
    assert follow_command.is_over(run)
