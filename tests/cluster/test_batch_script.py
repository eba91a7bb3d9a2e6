"""What `slurm/pretrain.sbatch` does with the ends of training, which is a line of bash here; SLURM is real."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from workplace import Workplace

NO_PREFLIGHT = {"SELFSIGHT_PREFLIGHT": "0"}
FAKE = """\
#!/bin/bash
# Python, but for training, which is: {training}
if [[ $1 == -m && $2 == pretrain ]]; then
  {training}
fi
exec {python} "$@"
"""


def fake(workplace: Workplace, training: str) -> dict[str, str]:
    """The environment of a job whose training is a line of bash."""
    python = workplace.folder / "python"
    python.write_text(FAKE.format(training=training, python=workplace.cluster.extra["SELFSIGHT_PYTHON"]))
    python.chmod(0o755)
    return {"SELFSIGHT_PYTHON": str(python), **NO_PREFLIGHT}


def test_a_job_that_crashes_each_time_starts_again_then_goes_through_the_queue_and_is_given_up(
    workplace: Workplace,
) -> None:
    env = fake(workplace, "exit 1") | {"SELFSIGHT_RESTARTS": "1", "SELFSIGHT_MAX_FAILURES": "2"}
    job = workplace.pretrain(workplace.preset("run"), **env)
    record = workplace.cluster.wait(job, "FAILED", timeout=180)
    assert record["Restarts"] == "1"
    assert record["ExitCode"] == "1:0"
    assert [event["event"] for event in workplace.history("run")] == ["restarted", "requeued", "given_up"]
    assert "given up: training crashed (1); more than 2 failures in a row" in workplace.printed(job)
    assert "What to do" in workplace.printed(job)


@pytest.mark.parametrize(
    "code", [pytest.param(2, marks=pytest.mark.cluster_full), 87, pytest.param(88, marks=pytest.mark.cluster_full)]
)
def test_what_would_go_wrong_again_is_not_requeued(workplace: Workplace, code: int) -> None:
    job = workplace.pretrain(workplace.preset("run"), **fake(workplace, f"exit {code}"))
    record = workplace.cluster.wait(job, "FAILED")
    assert (record["Restarts"], record["ExitCode"]) == ("0", f"{code}:0")
    assert [event["event"] for event in workplace.history("run")] == ["given_up"]


def test_a_setting_that_does_not_exist_ends_the_job_at_once(workplace: Workplace) -> None:
    preset = workplace.preset("run")
    job = workplace.pretrain(preset, overrides=("train.stpes=8",), **NO_PREFLIGHT)
    record = workplace.cluster.wait(job, "FAILED")
    assert (record["Restarts"], record["ExitCode"]) == ("0", "2:0")
    assert "did you mean train.steps" in workplace.printed(job)
    assert not (workplace.runs / "run").exists()


def test_ranks_that_stop_one_after_the_other_have_stopped(workplace: Workplace) -> None:
    training = '[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0; sleep "$SLURM_PROCID"; exit 85'
    job = workplace.pretrain(workplace.preset("run"), **fake(workplace, training))
    workplace.cluster.wait(job, "COMPLETED")
    assert [event["code"] for event in workplace.requeued("run")] == [85]


@pytest.mark.cluster_full
def test_a_rank_that_is_silent_after_the_others_ended_is_killed_within_a_minute(workplace: Workplace) -> None:
    training = "(( SLURM_PROCID )) && exit 86; trap '' TERM; while :; do sleep 1; done"
    env = fake(workplace, training) | {"SELFSIGHT_MAX_FAILURES": "0"}
    job = workplace.pretrain(workplace.preset("run"), **env)
    workplace.cluster.wait(job, "RUNNING")
    workplace.cluster.wait(job, "FAILED", timeout=100)
    assert workplace.cluster.processes_of(job) == []
    text = workplace.printed(job)
    assert "First task exited 30s ago" in text


def test_a_cancelled_job_stays_cancelled(workplace: Workplace) -> None:
    training = "trap 'exit 85' TERM USR1; echo training; while :; do sleep 0.1; done"
    job = workplace.pretrain(workplace.preset("run"), **fake(workplace, training))
    cluster = workplace.cluster
    cluster.until(lambda: "training" in cluster.log(job), 60, "training to begin", lambda: cluster.log(job))
    cluster.run("scancel", job)
    cluster.until_idle()
    assert cluster.state(job) == "CANCELLED"
    assert workplace.requeued("run") == []


@pytest.mark.cluster_full
def test_a_cancelled_job_stays_cancelled_where_python_can_not_ask_slurm(workplace: Workplace) -> None:
    env = fake(workplace, "trap 'exit 85' TERM USR1; echo training; while :; do sleep 0.1; done")
    python = Path(env["SELFSIGHT_PYTHON"])
    inside = "[[ $2 == launch.cluster.requeue ]] && export PATH=/nowhere\nexec "  # as in a container
    python.write_text(python.read_text().replace("exec ", inside))
    job, cluster = workplace.pretrain(workplace.preset("run"), **env), workplace.cluster
    cluster.until(lambda: "training" in cluster.log(job), 60, "training to begin", lambda: cluster.log(job))
    cluster.run("scancel", job)
    cluster.until_idle()
    assert cluster.state(job) == "CANCELLED"
    assert workplace.requeued("run") == []


def test_python_that_does_not_listen_yet_when_it_is_asked_to_stop_has_not_failed(workplace: Workplace) -> None:
    training = "[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0; echo training; exec sleep 1000"
    job, cluster = workplace.pretrain(workplace.preset("run"), **fake(workplace, training)), workplace.cluster
    cluster.until(lambda: cluster.log(job).count("training") == 2, 60, "both ranks", lambda: cluster.log(job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "COMPLETED")
    assert [(event["code"], event["failure"]) for event in workplace.requeued("run")] == [(85, False)]


@pytest.mark.cluster_full
def test_told_to_end_while_it_decides_it_decides_all_the_same(workplace: Workplace) -> None:
    env = fake(workplace, "[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0; exit 85")
    python, cluster = Path(env["SELFSIGHT_PYTHON"]), workplace.cluster
    slow = "[[ $2 == launch.cluster.requeue && $3 == 85 ]] && { echo deciding; sleep 3; } >&2\nexec "
    python.write_text(python.read_text().replace("exec ", slow))
    job = workplace.pretrain(workplace.preset("run"), **env)
    cluster.until(lambda: "deciding" in cluster.log(job), 60, "the decision", lambda: cluster.log(job))
    for pid, comm, environ in cluster.processes():  # some clusters signal every process of a job
        if environ.get("SLURM_JOB_ID") == job and not comm.startswith("slurmstepd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"


@pytest.mark.cluster_full
def test_where_sbatch_takes_no_environment_along_the_ranks_still_have_the_script_s(workplace: Workplace) -> None:
    env = fake(workplace, "[[ -n ${MASTER_ADDR:-} && -d ${TMPDIR:-/nowhere} ]] && exit 0; exit 2")
    given = {**workplace.cluster.extra, **env, "PATH": workplace.cluster.env["PATH"]}
    export = ",".join(f"{name}={value}" for name, value in given.items() if name != "TMPDIR")
    job = workplace.pretrain(workplace.preset("run"), f"--export={export}")
    assert workplace.cluster.wait(job, "COMPLETED")["Restarts"] == "0"


@pytest.mark.cluster_full
def test_what_a_process_dies_of_after_the_run_is_finished_does_not_count(workplace: Workplace) -> None:
    ended = '{"event": "ended", "job": "\'$SLURM_JOB_ID\'", "restart": 0, "code": 0}'
    training = f"((SLURM_PROCID)) && exit 0; echo '{ended}' >> '{workplace.runs}/run/history.jsonl'; kill -SEGV $$"
    (workplace.runs / "run").mkdir()
    job = workplace.pretrain(workplace.preset("run"), **fake(workplace, training))
    assert workplace.cluster.wait(job, "COMPLETED")["Restarts"] == "0"


@pytest.mark.cluster_full
def test_submitted_by_hand_from_inside_an_array_it_requeues_itself_and_nobody_else(workplace: Workplace) -> None:
    env = fake(workplace, "[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0; exit 85")
    inherited = {"SLURM_ARRAY_JOB_ID": "999", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "1"}
    job = workplace.pretrain(workplace.preset("run"), **env, **inherited)
    assert workplace.cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert [event["restart"] for event in workplace.requeued("run")] == [0]


@pytest.mark.parametrize(
    "who", ["the direct tasks only", pytest.param("every process of the steps", marks=pytest.mark.cluster_full)]
)
def test_told_to_end_by_either_way_of_signalling(workplace: Workplace, who: str) -> None:
    training = (
        "[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0; trap 'asked=1' TERM USR1; echo training; asked=0; "
        "while ((asked == 0)); do sleep 0.1; done; sleep 1; exit 85"
    )
    job = workplace.pretrain(workplace.preset("run"), **fake(workplace, training))
    cluster = workplace.cluster
    cluster.until(lambda: "training" in cluster.log(job), 60, "training to begin", lambda: cluster.log(job))
    cluster.until(lambda: len(cluster.ranks(job)) == 2, 60, "both ranks")
    if who == "the direct tasks only":
        for rank in cluster.ranks(job):
            cluster.signal_rank(job, rank, signal.SIGTERM)
    else:
        cluster.signal_step(job, signal.SIGTERM)
    cluster.wait(job, "COMPLETED", timeout=120)
    assert [event["code"] for event in workplace.requeued("run")] == [85]


@pytest.mark.cluster_full
def test_at_its_time_limit_without_a_warning_it_has_the_time_that_slurm_gives_before_it_kills(
    workplace: Workplace,
) -> None:
    training = "[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0; trap 'exit 85' TERM; while :; do sleep 0.2; done"
    # another signal than the one that the script listens for
    options = ("--time=1", "--signal=B:URG@1")
    job = workplace.pretrain(workplace.preset("run"), *options, **fake(workplace, training))
    workplace.cluster.until(lambda: workplace.cluster.job(job)["Restarts"] == "1", 180, "the job to come back")
    workplace.cluster.wait(job, "COMPLETED")
    assert [event["code"] for event in workplace.requeued("run")] == [85]


def test_without_its_disk_python_can_not_decide_and_the_script_does(workplace: Workplace) -> None:
    away = workplace.folder / "away"
    training = f'[[ ${{SLURM_RESTART_COUNT:-0}} == 1 ]] && exit 0; touch "{away}"; exit 1'
    env = fake(workplace, training)
    python = Path(env["SELFSIGHT_PYTHON"])
    gone = f'[[ -e "{away}" && ${{SLURM_RESTART_COUNT:-0}} == 0 ]] && exit 126\nexec '
    python.write_text(python.read_text().replace("exec ", gone))
    job = workplace.pretrain(workplace.preset("run"), **env)
    workplace.cluster.wait(job, "COMPLETED")
    assert workplace.cluster.job(job)["Restarts"] == "1"
    assert "could not ask" in workplace.printed(job)


def test_a_sick_node_is_left_out_and_the_job_starts_again_without_it(workplace: Workplace) -> None:
    env = fake(workplace, "exit 0")
    python = Path(env["SELFSIGHT_PYTHON"])
    run = workplace.runs / "run"
    record = (
        f"from pathlib import Path; from pretrain.survival.history import record; record(Path('{run}'), 'preflight', "
    )
    preflight = f"""\
if [[ $2 == launch.cluster.preflight && ${{SLURM_RESTART_COUNT:-0}} == 0 ]]; then
  if [[ $3 == --result ]]; then {workplace.cluster.extra["SELFSIGHT_PYTHON"]} -c "{record} sick=['n2'], text='')"; fi
  exit 3
elif [[ $2 == launch.cluster.preflight ]]; then exit 0; fi
exec """
    python.write_text(python.read_text().replace("exec ", preflight))
    env |= {"SELFSIGHT_PREFLIGHT": "1", "SELFSIGHT_EXCLUDE_SICK": "1"}
    job = workplace.pretrain(workplace.preset("run"), **env)
    done = workplace.cluster.wait(job, "COMPLETED")
    assert (done["Restarts"], done["ExcNodeList"], done["NodeList"]) == ("1", "n2", "n[1,3]")
    (event,) = workplace.requeued("run")
    assert (event["code"], event["failure"]) == (3, True)
    assert "n2" in event["reason"]
