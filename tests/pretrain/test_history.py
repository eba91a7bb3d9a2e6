from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.history import FILE, read_history, record


def test_events_come_back_in_order_and_know_their_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "new"
    record(run, "submitted", jobs=["7"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    record(run, "started", step=0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    record(run, "ended", step=5, code=85)
    events = read_history(run)
    assert [event["event"] for event in events] == ["submitted", "started", "ended"]
    assert [(event["job"], event["restart"]) for event in events] == [(None, None), ("7", 0), ("7", 2)]


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    record(tmp_path, "started", step=0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time": "20\n')
    record(tmp_path, "ended", step=1, code=0)
    assert [event["event"] for event in read_history(tmp_path)] == ["started", "ended"]
    assert read_history(tmp_path / "none") == []


def test_an_event_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no event 'strated'"):
        record(tmp_path, "strated")
