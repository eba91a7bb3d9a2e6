"""Jobs that are preempted, timed out, killed and abandoned: they come back, and end as if nothing had been.

To happen at a certain step, whatever it is waits while the job's processes are stopped (SIGSTOP), then they go on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from minicluster import MiniCluster
from workplace import Workplace

STEPS = 40
RUN: dict[str, Any] = {
    "train": {"steps": STEPS, "batch_size": 8},
    "checkpoint": {"every_steps": 10},
    "engine": {"device": "cpu", "threads": 1, "hang_seconds": None},
}
NO_PREFLIGHT = {"SELFSIGHT_PREFLIGHT": "0"}


@pytest.fixture(scope="module")
def uninterrupted(cluster: MiniCluster, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict[str, Any]]:
    """The metrics of the run of all these tests, when nothing happens to it; with the preflight, as by default."""
    workplace = Workplace(cluster, tmp_path_factory.mktemp("uninterrupted"), shards)
    job = workplace.pretrain(workplace.preset("run", **RUN))
    cluster.wait(job, "COMPLETED", timeout=300)
    return learnt(workplace, "run")


def learnt(workplace: Workplace, name: str) -> list[dict[str, Any]]:
    """What a run has seen and learnt, step by step: all of its metrics that do not measure time or memory."""
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "ids_digest", "bad_samples")
    return [{key: row[key] for key in keys if key in row} for row in workplace.metrics(name)]


def stop_at(workplace: Workplace, job: str, name: str, step: int) -> list[int]:
    """Hold a job's steps still once the run has reached a step; their processes."""
    workplace.until_step(name, step, job, timeout=300)
    stopped = workplace.cluster.signal_step(job, signal.SIGSTOP)
    assert workplace.metrics(name)[-1]["step"] < STEPS - 2, "it was too fast for this test"
    return stopped


def check_whole(workplace: Workplace, job: str, name: str, uninterrupted: list[dict[str, Any]]) -> None:
    """The job completes, with the same numbers in every step, and leaves nothing behind."""
    workplace.cluster.wait(job, "COMPLETED", timeout=300)
    assert learnt(workplace, name) == uninterrupted
    assert (workplace.runs / name / "encoder" / "config.json").is_file()
    assert workplace.cluster.processes_of(job) == []
    left = Path(workplace.cluster.extra["TMPDIR"]).glob(f"selfsight-{job}-*")
    assert [path.name for path in left] == []


def test_preempted_and_at_its_time_limit_a_run_goes_on_and_ends_as_an_uninterrupted_one(
    workplace: Workplace, uninterrupted: list[dict[str, Any]]
) -> None:
    cluster = workplace.cluster
    job = workplace.pretrain(workplace.preset("run", **RUN), "--partition=scavenge", "--time=30", **NO_PREFLIGHT)
    stop_at(workplace, job, "run", 5)
    workplace.preempt(job)

    cluster.wait(job, "RUNNING")
    at = workplace.requeued("run")[-1]["checkpoint"]
    assert 5 <= at < STEPS - 4, "it stopped at the step in which it was told, not at the next checkpoint"
    stop_at(workplace, job, "run", at + 2)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    cluster.until(lambda: "the time limit is near" in workplace.printed(job), 90, "the warning of the time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # or the next start meets it again
    cluster.signal_step(job, signal.SIGCONT)

    check_whole(workplace, job, "run", uninterrupted)
    assert [event["code"] for event in workplace.requeued("run")] == [85, 85]
    assert not any(event["failure"] for event in workplace.requeued("run"))
    assert cluster.job(job)["Restarts"] == "2"


def test_a_killed_rank_is_named_and_training_starts_again_in_the_same_job(
    workplace: Workplace, uninterrupted: list[dict[str, Any]]
) -> None:
    cluster = workplace.cluster
    watched = RUN | {"engine": RUN["engine"] | {"hang_seconds": 1800}}  # with signs of life
    job = workplace.pretrain(workplace.preset("run", **watched))
    stop_at(workplace, job, "run", 12)
    cluster.signal_rank(job, 1, signal.SIGKILL)
    killed = time.monotonic()
    cluster.signal_step(job, signal.SIGCONT)
    starts = lambda: [event for event in workplace.history("run") if event["event"] == "started"]  # noqa: E731
    cluster.until(lambda: len(starts()) == 2, 120, "the next step", lambda: cluster.log(job))
    print(f"from a rank's death to the next step: {time.monotonic() - killed:.1f} s")
    check_whole(workplace, job, "run", uninterrupted)
    (event,) = [event for event in workplace.history("run") if event["event"] == "restarted"]
    assert event["failure"]
    assert "killed without a word: rank 1 on n2, last seen in" in event["reason"]
    assert "rank 1 on n2" in (workplace.runs / "run" / "errors.log").read_text()
    assert cluster.job(job)["Restarts"] == "0"
    assert workplace.requeued("run") == []


@pytest.mark.cluster_full  # without SLURM, tests/pretrain kills and truncates the same
def test_a_killed_rank_and_a_truncated_checkpoint_cost_the_steps_since_the_one_before(
    workplace: Workplace, uninterrupted: list[dict[str, Any]]
) -> None:
    cluster = workplace.cluster
    job = workplace.pretrain(workplace.preset("run", **RUN), **NO_PREFLIGHT, SELFSIGHT_RESTARTS="0")
    stop_at(workplace, job, "run", 22)
    cluster.signal_rank(job, 1, signal.SIGKILL)
    killed = time.monotonic()
    cluster.signal_step(job, signal.SIGCONT)
    cluster.until(lambda: bool(workplace.requeued("run")), 60, "the job to be over", lambda: cluster.log(job))
    assert time.monotonic() - killed < 60
    newest = workplace.runs / "run" / "checkpoints" / "step-00000020"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)

    check_whole(workplace, job, "run", uninterrupted)
    (event,) = workplace.requeued("run")
    assert event["failure"]
    assert event["checkpoint"] == 20
    said = workplace.printed(job)
    assert re.search(r"step-00000020.*damaged", said)
    assert re.search(r"continuing from \S*step-00000010", said)


@pytest.mark.cluster_full
@pytest.mark.parametrize(
    ("lost", "left"),
    # with the first node go the batch script, which outlives it here, and the first rank, which holds the run's lock
    [("n2", "n[1,3]"), ("n1", "n[2-3]")],
)
def test_a_lost_node_ends_the_job_which_goes_on_elsewhere(
    workplace: Workplace, uninterrupted: list[dict[str, Any]], lost: str, left: str
) -> None:
    cluster = workplace.cluster
    job = workplace.pretrain(workplace.preset("run", **RUN), **NO_PREFLIGHT)
    silent = stop_at(workplace, job, "run", 15)  # nobody of it will ever say a word again
    cluster.kill_slurmd(lost)
    killed = time.monotonic()
    try:
        cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 60, "the job to be over", lambda: cluster.log(job))
        assert time.monotonic() - killed < 60
        cluster.until(lambda: cluster.job(job)["NodeList"] == left, 90, "the job to start on other nodes")
        for pid in silent:  # a node that is really lost takes them along
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.wait(job, "COMPLETED", timeout=300)
    finally:
        cluster.start_slurmd(lost)
    assert learnt(workplace, "run") == uninterrupted
    (event,) = workplace.requeued("run")
    assert event["failure"]
    cluster.until(lambda: not cluster.processes_of(job), 30, "everything of the job to be gone")


@pytest.mark.cluster_full
def test_requeued_without_a_warning_only_the_steps_since_the_last_checkpoint_are_repeated(
    workplace: Workplace, uninterrupted: list[dict[str, Any]]
) -> None:
    cluster = workplace.cluster
    job = workplace.pretrain(workplace.preset("run", **RUN), **NO_PREFLIGHT)
    workplace.until_step("run", 12, job, timeout=300)
    cluster.run("scontrol", "requeue", job)
    check_whole(workplace, job, "run", uninterrupted)
    (event,) = workplace.requeued("run")
    assert not event["failure"], "an administrator who requeues a job is no failure of it"
