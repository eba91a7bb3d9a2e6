"""Reports in a folder: whole, of this start, and seen by the others."""

from __future__ import annotations

import os
import time
from pathlib import Path

from launch.cluster.rendezvous import DONE, STALE_SECONDS, Meeting, Report, names_of_start, wait_until
from launch.ranks import rank_environment

SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "n1",
}


def report(rank: int, start: str = "12-0-3", nonce: str = "a") -> Report:
    return Report(start, rank, "n1", rank, 2, nonce)


def test_reports_are_seen_as_they_change_and_only_those_of_this_start(tmp_path: Path) -> None:
    one, two = Meeting(tmp_path / "12-0", "12-0-3"), Meeting(tmp_path / "12-0", "12-0-3")
    mine, other = report(0), report(1)
    assert abs(one.leave(mine)) < 5
    two.leave(other)
    assert [seen.phase for seen in one.reports().values()] == ["starting", "starting"]
    other.phase = DONE
    two.leave(other)
    assert one.reports()[1].phase == DONE
    assert one.reports()[1] == other
    Meeting(tmp_path / "12-0", "12-0-2").leave(report(2, "12-0-2"))
    (tmp_path / "12-0" / "rank-00003.json").write_text("{")
    (tmp_path / "12-0" / "rank-00004.json").write_text("[1]")
    assert sorted(one.reports()) == [0, 1]


def test_a_report_of_long_ago_is_none(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path, "same")
    meeting.leave(report(1, "same"))
    long_ago = time.time() - STALE_SECONDS - 60
    os.utime(tmp_path / "rank-00001.json", (long_ago, long_ago))
    meeting.leave(report(0, "same"))
    assert sorted(meeting.reports()) == [0]


def test_what_is_told_reaches_those_it_was_meant_for(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path, "same")
    meeting.leave(report(0))
    meeting.tell("go", {"to": ["a"], "nodes": ["n1"]})
    assert meeting.told("go", "a") == {"to": ["a"], "nodes": ["n1"]}
    assert meeting.told("go", "of an earlier start") is None
    assert meeting.told("result", "a") is None
    meeting.tidy()
    assert not list(tmp_path.iterdir())


def test_all_tasks_of_a_start_call_it_the_same() -> None:
    other = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    names = names_of_start(SRUN, rank_environment(SRUN))
    assert names == names_of_start(other, rank_environment(other)) == ("12-0", "12-0-3")
    again = SRUN | {"SLURM_RESTART_COUNT": "2"}
    assert names_of_start(again, rank_environment(again))[0] == "12-2"


def test_waiting_has_a_limit() -> None:
    before = time.monotonic()
    assert not wait_until(lambda: False, 0.2)
    assert time.monotonic() - before < 5
    assert wait_until(lambda: True, 0)
