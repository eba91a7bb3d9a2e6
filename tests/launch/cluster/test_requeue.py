from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import config_data

from launch.cluster.requeue import (
    AGAIN,
    ALREADY_BACK,
    BACK,
    FINISHED,
    GIVEN_UP,
    STANDSTILLS,
    Queued,
    Requeue,
    ask_queue,
    main,
)
from launch.cluster.verdict import CEILING, EXIT_SICK
from pretrain.survival.failures import ERRORS, noted, start_of
from pretrain.survival.heartbeat import Heartbeat, read_beats
from pretrain.survival.history import read_history, record
from pretrain.survival.stopping import EXIT_HUNG, EXIT_NOT_SAVED, EXIT_STOPPED, EXIT_TROUBLE, EXIT_USER_ERROR

MINE = Queued()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder of job 7, which was not restarted yet, and goes through the queue each time."""
    at(monkeypatch, 0)
    monkeypatch.setenv("SELFSIGHT_RESTARTS", "0")
    return tmp_path


def at(monkeypatch: pytest.MonkeyPatch, restart: int, job: str = "7") -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def decision(run: Path, **environ: str) -> Requeue:
    import os

    return Requeue(run, {**os.environ, **environ})


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def last(run: Path) -> dict[str, Any]:
    return read_history(run)[-1]


@pytest.mark.parametrize("why", ["the time limit, with a step between", "preemption", "nobody knows"])
def test_a_run_that_stopped_as_asked_always_goes_back(run: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(CEILING * 5):
        at(monkeypatch, restart)
        queued = None if why == "nobody knows" else Queued(restart, preempted=why == "preemption")
        if why.startswith("the time limit"):
            checkpoint(run, restart)
        assert decision(run).at_end(EXIT_STOPPED, queued) == BACK
    assert last(run)["event"] == "requeued"
    assert not last(run)["failure"]


def test_a_time_limit_in_which_nothing_gets_done_does_not_bring_a_job_back_for_ever(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(run, 5)
    for restart in range(STANDSTILLS + 1):
        at(monkeypatch, restart)
        assert decision(run).at_start() == BACK
        assert decision(run).at_end(EXIT_STOPPED, Queued(restart)) == BACK
    at(monkeypatch, STANDSTILLS + 1)
    assert decision(run).at_end(EXIT_STOPPED, Queued(STANDSTILLS + 1)) == GIVEN_UP
    assert "asked to stop 5 times in a row without a newer checkpoint" in last(run)["reason"]
    assert "--time" in capsys.readouterr().err


def facts_of(start: str, preempted: str) -> str:
    return f"JobId=7 JobName=x JobState=RUNNING Reason=None Restarts=2 StartTime={start} PreemptTime={preempted} Power="


def test_without_scontrol_what_it_told_the_batch_script_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # as inside a container
    for preempted, expected in (("None", False), ("2026-01-01T10:30:00", True), ("2026-01-01T09:30:00", False)):
        facts = facts_of("2026-01-01T10:00:00", preempted)
        assert ask_queue({"SLURM_JOB_ID": "7", "SELFSIGHT_JOB_FACTS": facts}) == Queued(2, preempted=expected)
    assert ask_queue({"SLURM_JOB_ID": "7", "SELFSIGHT_JOB_FACTS": ""}) is None


@pytest.mark.parametrize("code", [EXIT_USER_ERROR, EXIT_TROUBLE, EXIT_NOT_SAVED])
def test_what_would_go_wrong_again_never_goes_back(run: Path, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert decision(run).at_end(code, MINE) == GIVEN_UP
    assert last(run)["event"] == "given_up"
    assert last(run)["code"] == code
    assert "What to do" in capsys.readouterr().err


@pytest.mark.parametrize("code", [1, EXIT_HUNG, 137, 139, 143, 77])
def test_failures_go_back_until_there_were_too_many_in_a_row(
    run: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(run, 10)
    answers = []
    for restart in range(4):
        at(monkeypatch, restart)
        answers.append(decision(run).at_end(code, Queued(restart)))
    assert answers == [BACK, BACK, BACK, GIVEN_UP]
    assert "more than 3 failures in a row" in last(run)["reason"]


def test_a_newer_checkpoint_makes_failures_count_anew_but_not_without_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for restart in range(CEILING + 1):
        checkpoint(run, restart)
        at(monkeypatch, restart)
        answers.append(decision(run, SELFSIGHT_MAX_FAILURES="1").at_end(1, Queued(restart)))
    assert answers == [BACK] * CEILING + [GIVEN_UP]


def test_failures_of_another_job_do_not_count(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("5", "6"):
        for restart in range(3):
            at(monkeypatch, restart, job)
            decision(run).at_end(1, Queued(restart))
    at(monkeypatch, 0)
    assert decision(run).at_end(1, MINE) == BACK


def test_the_run_s_own_word_counts_more_than_the_highest_code_of_all_ranks(run: Path) -> None:
    record(run, "ended", step=5, code=EXIT_STOPPED, reason="stopped by SIGUSR1")
    assert decision(run).at_end(137, MINE) == BACK
    assert last(run)["reason"] == "stopped by SIGUSR1"
    record(run, "ended", step=9, code=EXIT_TROUBLE, reason="loss is nan")
    assert decision(run).at_end(143, MINE) == GIVEN_UP
    assert "loss is nan" in last(run)["reason"]


def test_a_run_that_says_it_is_finished_is_whatever_its_processes_died_of_then(run: Path) -> None:
    record(run, "ended", code=0, reason="finished", step=8)
    assert decision(run).at_end(139, MINE) == FINISHED  # as drivers do when a process ends
    assert [event["event"] for event in read_history(run)] == ["ended"]


def test_a_start_that_left_no_word_counts_as_a_failure(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decision(run).at_start() == BACK
    answers = []
    for restart in range(1, 5):
        at(monkeypatch, restart)
        record(run, "started", step=0)
        answers.append(decision(run).at_start())
    assert answers == [BACK, BACK, BACK, GIVEN_UP]
    reasons = [event["reason"] for event in read_history(run) if event["event"] == "requeued"]
    assert all("first node" in reason for reason in reasons)


def test_a_start_whose_end_was_judged_is_not_judged_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decision(run).at_end(137, MINE)
    at(monkeypatch, 1)
    before = read_history(run)
    assert decision(run).at_start() == BACK
    assert read_history(run) == before


def test_what_must_not_go_on_does_not_when_slurm_put_it_back_before_it_was_judged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(run, "ended", step=5, code=EXIT_NOT_SAVED, reason="no space left")
    at(monkeypatch, 1)
    assert decision(run).at_start() == GIVEN_UP


@pytest.mark.parametrize("queued", [Queued(1, "COMPLETING"), Queued(1), Queued(0, "PENDING")])
def test_a_job_that_slurm_has_put_back_is_left_alone(run: Path, queued: Queued) -> None:
    assert decision(run).at_end(137, queued) == ALREADY_BACK
    assert last(run)["event"] == "requeued"
    assert "SLURM has put the job back itself" in last(run)["reason"]


def test_a_job_that_somebody_has_ended_stays_so_but_not_one_that_met_its_time_limit(run: Path) -> None:
    assert decision(run).at_end(EXIT_STOPPED, Queued(state="COMPLETING")) == GIVEN_UP
    assert last(run)["reason"] == "cancelled by scancel"
    assert decision(run).at_end(EXIT_STOPPED, Queued(state="COMPLETING", reason="TimeLimit")) == BACK
    assert decision(run).at_end(EXIT_STOPPED, Queued(state="SIGNALING")) == BACK  # being told that it is near
    (run / "cancelled").write_text('{"by": "ada", "jobs": ["6"]}')
    assert decision(run).at_end(EXIT_STOPPED, MINE) == BACK
    (run / "cancelled").write_text('{"by": "ada", "jobs": ["7"]}')
    assert decision(run).at_end(EXIT_STOPPED, MINE) == GIVEN_UP
    assert last(run)["reason"] == "cancelled by ada"
    assert decision(run).at_start() == GIVEN_UP


def test_sick_nodes_are_named_and_left_out_only_where_allowed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run, "preflight", sick=["n2", "n5"], text="clock")
    queued = Queued(excluded="n[5,9],m[1,9]")
    assert decision(run).at_end(EXIT_SICK, queued) == GIVEN_UP
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--exclude=n2,n5" in captured.err
    assert decision(run, SELFSIGHT_EXCLUDE_SICK="1").at_end(EXIT_SICK, queued) == BACK
    assert capsys.readouterr().out == "n[5,9],m[1,9],n2,n5\n", "a list of SLURM's is not to be taken apart"


def test_the_command_finds_the_run_and_refuses_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.cluster.requeue.ask_queue", lambda environ: None)
    at(monkeypatch, 0)
    preset = tmp_path / "a.yaml"
    preset.write_text(yaml.safe_dump(config_data("mae", "vit", tmp_path, tmp_path / "runs")))
    assert main(["85", str(preset), "name=b"]) == BACK
    assert last(tmp_path / "runs" / "b")["event"] == "requeued"
    assert main(["85", str(preset), "nmae=b"]) == EXIT_USER_ERROR
    assert "nmae" in capsys.readouterr().err
    monkeypatch.setenv("SELFSIGHT_MAX_FAILURES", "few")
    assert main(["started", str(preset)]) == EXIT_USER_ERROR


def test_a_failed_job_starts_again_where_it_is_before_it_goes_through_the_queue(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(run, 10)
    inside = {"SELFSIGHT_RESTARTS": "2"}
    record(run, "ended", step=12, code=1, reason="RuntimeError: boom")
    assert decision(run, **inside).at_end(1, MINE) == AGAIN
    assert "training starts again in this job: training crashed (1)" in capsys.readouterr().err
    assert decision(run, **inside).at_end(137, MINE) == AGAIN
    assert "boom" not in last(run)["reason"], "that was the start before"
    assert decision(run, **inside).at_end(1, MINE) == BACK
    assert [event["event"] for event in read_history(run)] == ["ended", "restarted", "restarted", "requeued"]
    at(monkeypatch, 1)
    assert decision(run, **inside).at_start() == BACK
    assert decision(run, **inside).at_end(1, Queued(1)) == GIVEN_UP, "three in a row are enough, wherever it started"


def test_progress_makes_restarts_count_anew(run: Path) -> None:
    for step in range(4):
        checkpoint(run, step)
        assert decision(run, SELFSIGHT_RESTARTS="1").at_end(1, MINE) == AGAIN


@pytest.mark.parametrize(
    ("code", "environ", "queued"),
    [
        (1, {"SELFSIGHT_ASKED": "1"}, MINE),  # there is no time left
        (1, {}, Queued(state="COMPLETING", reason="TimeLimit")),
        (EXIT_STOPPED, {}, MINE),
        (1, {"SELFSIGHT_RESTARTS": "0"}, MINE),
    ],
)
def test_it_does_not_start_again_where_that_would_be_for_nothing(
    run: Path, code: int, environ: dict[str, str], queued: Queued
) -> None:
    assert decision(run, **{"SELFSIGHT_RESTARTS": "2"} | environ).at_end(code, queued) == BACK


def test_a_job_that_lost_a_node_goes_through_the_queue(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cluster.requeue.lost_nodes", lambda names: ["n2"] if names == "n[1-2]" else [])
    inside = {"SELFSIGHT_RESTARTS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert decision(run, **inside).at_end(1, MINE) == BACK


def fail(run: Path, rank: int, step: int, error: Exception) -> None:
    with pytest.raises(type(error)), noted(run, rank, {"step": step}):
        raise error


def test_the_first_to_fail_is_named_and_what_all_said_is_gathered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    fail(run, 0, 8, RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4711"))
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    fail(run, 3, 8, RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert decision(run).at_end(1, MINE) == BACK
    assert "first to fail: rank 3 on n2 after step 8: RuntimeError: CUDA error: an illegal" in last(run)["reason"]
    said = (run / ERRORS).read_text()
    assert said.index("illegal memory access") < said.index("rank 0 on n1")
    assert "Traceback" in said


def test_a_rank_that_says_nothing_more_was_killed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    fail(run, 0, 8, RuntimeError("[gloo] Connection reset by peer"))
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    Heartbeat(run, 1).beat(9, "forward", 0.1, 0.0, None)
    decision(run).at_end(137, MINE)
    assert "killed without a word: rank 1 on n2, last seen in `forward` of step 9" in last(run)["reason"]
    assert read_beats(run) == {}, "the next start has its own"


def test_what_failed_in_an_earlier_start_is_not_blamed_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(run, 1, 8, RuntimeError("boom"))
    monkeypatch.setenv("SELFSIGHT_ATTEMPT", "1")
    assert start_of({"SLURM_JOB_ID": "7", "SELFSIGHT_ATTEMPT": "1"}) == "7-0-1"
    decision(run).at_end(137, MINE)
    assert "boom" not in last(run)["reason"]
