"""The order of the demo's steps, with its commands replaced; the demo itself runs in `make demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import launch.demo
from launch.demo import run_demo


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    ran: list[list[str]] = []
    monkeypatch.setattr(launch.demo, "_run", lambda command: ran.append(command) or 0)
    monkeypatch.setattr(launch.demo, "_show_results", lambda run: print("TABLE"))
    return ran


def test_the_whole_way_in_order(tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    run_demo(tmp_path)
    assert [command[0] for command in commands] == ["demo-data", "pack", "verify", "pretrain", "probe"]
    assert f"$ selfsight pack {tmp_path}/images {tmp_path}/shards" in capsys.readouterr().out


def test_a_second_run_only_shows_the_results(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(tmp_path)
    assert "TABLE" not in capsys.readouterr().out  # the probe itself has shown it
    commands.clear()
    run_demo(tmp_path)
    assert not commands
    assert "TABLE" in capsys.readouterr().out


def test_a_failed_step_ends_it_and_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    codes = {"pretrain": 85}
    monkeypatch.setattr(launch.demo, "_run", lambda command: ran.append(command[0]) or codes.get(command[0], 0))
    with pytest.raises(SystemExit) as exit_:
        run_demo(tmp_path)
    assert exit_.value.code == 85
    codes.clear()
    run_demo(tmp_path)
    assert ran == ["demo-data", "pack", "verify", "pretrain", "pretrain", "probe"]


def test_what_another_version_made_is_not_taken_for_done(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_demo(tmp_path)
    monkeypatch.setattr(launch.demo, "_recipe", lambda: "another")
    with pytest.raises(ValueError, match="made by another version of the demo"):
        run_demo(tmp_path)


def test_a_command_that_dies_is_told_as_a_shell_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert launch.demo._run(["pack"]) == 1
