"""One wandb run of a training on two nodes that is preempted, loses a rank, and is probed: read back from the disk."""

from __future__ import annotations

import signal

import pytest
from tracked import tracked_run
from workplace import ROOT, Workplace

STEPS = 40
OFFLINE = {"WANDB_MODE": "offline", "SELFSIGHT_PREFLIGHT": "0"}


def held_at(workplace: Workplace, job: str, step: int) -> None:
    """Hold the job's steps still once the run has reached a step."""
    workplace.until_step("run", step, job, timeout=300)
    workplace.cluster.signal_step(job, signal.SIGSTOP)
    assert workplace.metrics("run")[-1]["step"] < STEPS - 2, "it was too fast for this test"


@pytest.mark.cluster_full
def test_a_preempted_killed_and_probed_training_is_one_run_of_wandb_without_holes(workplace: Workplace) -> None:
    cluster = workplace.cluster
    preset = workplace.preset(
        "run",
        train={"steps": STEPS, "batch_size": 8},
        checkpoint={"every_steps": 5},
        engine={"device": "cpu", "threads": 1, "hang_seconds": None},
        tracking={
            "wandb": "auto", "project": "photos", "group": "sizes", "pictures_every_steps": 10,
            "system_every_seconds": 0.2,
        },
    )  # fmt: skip
    job = workplace.pretrain(preset, "--partition=scavenge", "--time=30", SELFSIGHT_RESTARTS="0", **OFFLINE)
    held_at(workplace, job, 4)
    workplace.preempt(job)
    cluster.wait(job, "RUNNING")
    held_at(workplace, job, workplace.requeued("run")[-1]["checkpoint"] + 2)
    cluster.signal_rank(job, 0, signal.SIGKILL)
    cluster.signal_step(job, signal.SIGCONT)
    cluster.wait(job, "COMPLETED", timeout=300)
    assert [event["failure"] for event in workplace.requeued("run")] == [False, True]

    run = workplace.runs / "run"
    trained = tracked_run(run)
    assert len(trained.ids) == 1
    assert len(trained.files) == 3, "a life, a file"
    assert {(file.project, file.group, file.job_type) for file in trained.files if file.id} == {
        ("photos", "sizes", "pretrain")
    }
    logged = {row["step"]: row["loss"] for row in workplace.metrics("run")}
    assert list(logged) == list(range(1, STEPS + 1))
    assert trained.column("loss") == logged, "every step once, with the numbers of metrics.jsonl"
    nodes = {name.split("/")[1] for name in trained.names() if name.startswith("system/")}
    assert nodes >= {"n1", "n2"}
    for node in ("n1", "n2"):
        assert all(value > 0 for value in trained.column(f"system/{node}/memory_used_gb").values())
        assert trained.column(f"system/{node}/processes_gb")
    pictures = [name for name in trained.names() if name.startswith("pictures/")]
    assert pictures
    assert all({1, 10, 20, 30, 40} <= set(trained.column(name)) for name in pictures)

    labelled = workplace.folder / "labelled"
    labelled.mkdir()
    (labelled / "train-000000.tar").symlink_to(workplace.shards / "train-000000.tar")
    (labelled / "val-000000.tar").symlink_to(workplace.shards / "train-000001.tar")
    script = ROOT / "slurm" / "probe.sbatch"
    probe = workplace.sbatch(
        script, run, "--data", labelled, "--device=cpu", "--epochs=2", "--seeds=2", env={"WANDB_MODE": "offline"}
    )
    cluster.wait(probe, "COMPLETED", timeout=300)
    probed = tracked_run(run)
    assert probed.ids == trained.ids
    assert probed.column("loss") == logged
    share, low = probed.column("probe/linear")[STEPS], probed.column("probe/linear_low")[STEPS]
    assert low == share - probed.column("probe/linear_error")[STEPS]
    last = probed.files[-1]
    assert (last.summary["loss"], last.summary["probe/linear"]) == (logged[STEPS], share)
    assert last.config["optim"] == trained.files[0].config["optim"]
