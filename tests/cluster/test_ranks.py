"""The same run however its ranks are started, and what is said when they are started wrongly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from workplace import Workplace

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--exclusive", "--kill-on-bad-exit=1")
PRETRAIN = (sys.executable, "-m", "pretrain")


def run(workplace: Workplace, *argv: str | Path, check: bool = True) -> Any:
    return workplace.cluster.run(*argv, check=check, timeout=300, cwd=workplace.folder)


def losses(workplace: Workplace, name: str) -> list[tuple[int, float]]:
    return [(row["ids_digest"], row["loss"]) for row in workplace.metrics(name)]


def assert_same_run(workplace: Workplace, one: str, other: str) -> None:
    expected, found = losses(workplace, one), losses(workplace, other)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=2e-5)
    assert len(found) == 4


@pytest.mark.cluster_full
def test_two_nodes_of_two_tasks_are_four_ranks(workplace: Workplace) -> None:
    train = {"steps": 4, "batch_size": 8}
    alone = workplace.preset("alone", train=train)
    run(workplace, *PRETRAIN, alone)
    spread = workplace.preset("spread", train=train)
    done = run(workplace, "srun", *TWO_BY_TWO, *PRETRAIN, spread)
    assert "4 ranks on cpu" in done.stdout
    assert_same_run(workplace, "alone", "spread")
    (started, ended) = workplace.history("spread")
    assert (started["event"], started["ranks"], started["nodes"]) == ("started", 4, 2)
    assert (ended["event"], ended["code"], ended["reason"], ended["step"]) == ("ended", 0, "finished", 4)


@pytest.mark.cluster_full
def test_unequal_numbers_of_tasks_and_a_step_in_a_larger_job(workplace: Workplace) -> None:
    """Three tasks on two nodes: the second has one. Of the job's three nodes the step has two."""
    uneven = workplace.preset("uneven", train={"steps": 4, "batch_size": 6})
    script = workplace.folder / "uneven.sh"
    command = " ".join(("srun", "--nodes=2", "--ntasks=3", *PRETRAIN, str(uneven)))
    script.write_text(f"#!/bin/bash\nprintenv SLURM_JOB_NODELIST\n{command}\n")
    job = workplace.sbatch("--nodes=3", "--ntasks-per-node=2", "--exclusive", script)
    workplace.cluster.wait(job, "COMPLETED", timeout=240)
    assert len(losses(workplace, "uneven")) == 4
    (started, _) = workplace.history("uneven")
    assert (started["ranks"], started["nodes"], started["job"]) == (3, 2, job)


@pytest.mark.cluster_full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "selfsight"])
def test_every_launcher_makes_the_same_run(workplace: Workplace, launcher: str) -> None:
    train = {"steps": 4, "batch_size": 8}
    run(workplace, *PRETRAIN, workplace.preset("alone", train=train))
    preset = workplace.preset(launcher, train=train)
    command: dict[str, tuple[str | Path, ...]] = {
        "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pretrain", preset),
        "deepspeed": (
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus=2",
            "--module",
            "pretrain",
            preset,
        ),
        "selfsight": (sys.executable, "-m", "launch", "launch", "--nproc", "2", preset),
    }
    done = run(workplace, *command[launcher])
    assert "2 ranks on cpu" in done.stdout + done.stderr
    assert_same_run(workplace, "alone", launcher)


@pytest.mark.cluster_full
def test_torchrun_on_two_nodes(workplace: Workplace) -> None:
    train = {"steps": 4, "batch_size": 8}
    run(workplace, *PRETRAIN, workplace.preset("alone", train=train))
    preset = workplace.preset("elastic", train=train)
    agent = (
        "-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=static --rdzv-endpoint=127.0.0.1:29417"
    )
    script = f'exec {sys.executable} {agent} --node-rank="$SLURM_NODEID" -m pretrain {preset}'
    run(workplace, "srun", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "bash", "-c", script)
    assert_same_run(workplace, "alone", "elastic")


def test_an_error_of_all_ranks_is_told_once_and_ends_with_its_code(workplace: Workplace) -> None:
    preset = workplace.preset("wrong", train={"steps": 4, "batch_size": 6})
    done = run(workplace, "srun", *TWO_BY_TWO, *PRETRAIN, preset, check=False)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("does not divide over 4 ranks") == 1
    assert not (workplace.runs / "wrong").exists()


def test_as_many_tasks_as_gpus(workplace: Workplace) -> None:
    preset = workplace.preset("gpus", engine={"device": "auto"})
    done = run(workplace, "srun", "--gpus-per-node=2", "--ntasks=1", *PRETRAIN, preset, check=False)
    assert done.returncode == 2
    assert "this step has 2 GPUs but 1 tasks on node n1" in done.stderr
    assert "--ntasks-per-node=2" in done.stderr


@pytest.mark.cluster_full
def test_jobs_that_share_a_node_meet_at_ports_of_their_own(workplace: Workplace) -> None:
    preset = workplace.preset("element", train={"steps": 2, "batch_size": 8})
    script = workplace.folder / "array.sh"
    command = " ".join(("srun", *PRETRAIN, str(preset), "name=element-$SLURM_ARRAY_TASK_ID"))
    script.write_text(f"#!/bin/bash\n{command}\n")
    job = workplace.sbatch("--array=0-1", "--nodes=1", "--ntasks=2", "--nodelist=n1", script)
    for element in ("0", "1"):
        workplace.cluster.wait(f"{job}_{element}", "COMPLETED", timeout=240)
        (started, ended) = workplace.history(f"element-{element}")
        assert (started["ranks"], ended["code"]) == (2, 0)
