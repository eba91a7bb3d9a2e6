from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pretrain.survival.history import FILE, read_history, record, recorded_end


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


def end_of(run: Path, error: BaseException | None, **about: object) -> dict[str, object]:
    with contextlib.suppress(BaseException), recorded_end(run, dict(about)):
        if error is not None:
            raise error
    return read_history(run)[-1]


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (None, 0, "finished"),
        (SystemExit(85), 85, "stopped as asked"),
        (ValueError("no such thing"), 2, "ValueError: no such thing"),
        (RuntimeError("CUDA out of memory"), 1, "RuntimeError: CUDA out of memory"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt: "),
    ],
)
def test_every_end_is_recorded(tmp_path: Path, error: BaseException | None, code: int, reason: str) -> None:
    if isinstance(error, ValueError):  # of our own code's: one of a library is no message to the user
        with pytest.raises(ValueError, match="no event"), recorded_end(tmp_path, {"step": 3}):
            record(tmp_path, "nonsense")
        ended = read_history(tmp_path)[-1]
        assert (ended["code"], ended["step"]) == (2, 3)
        return
    ended = end_of(tmp_path, error, step=3)
    assert (ended["event"], ended["code"], ended["reason"], ended["step"]) == ("ended", code, reason, 3)


def test_a_refused_start_leaves_the_history_of_a_begun_run_as_it_was(tmp_path: Path) -> None:
    for begun in (False, True):
        with pytest.raises(ValueError, match="no event"), recorded_end(tmp_path, {"step": 0}):
            record(tmp_path, "nonsense")
        assert [event["event"] for event in read_history(tmp_path)] == ["ended", "started"][: 1 + begun]
        if not begun:
            record(tmp_path, "started", step=1)


def test_a_reason_that_is_known_is_kept(tmp_path: Path) -> None:
    assert end_of(tmp_path, SystemExit(85), step=1, reason="stopped by SIGTERM")["reason"] == "stopped by SIGTERM"


def test_a_folder_that_takes_no_event_stops_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with recorded_end(tmp_path / "file", {"step": 1}):
        pass
    assert "'ended' could not be recorded" in capsys.readouterr().err


def test_a_line_that_a_full_disk_cut_takes_no_other_along(tmp_path: Path) -> None:
    record(tmp_path, "started", step=0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time": "2026-11-21T00:00:00+00:00", "ev')
    record(tmp_path, "requeued", code=85, reason="stopped")
    record(tmp_path, "ended", code=0)
    assert [event["event"] for event in read_history(tmp_path)] == ["started", "requeued", "ended"]
