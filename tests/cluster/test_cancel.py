"""`selfsight cancel` on a real cluster: a run ends with a checkpoint, and does not come back."""

from __future__ import annotations

import json

import pytest
from workplace import ROOT, Workplace

from pretrain.survival.history import record

SCRIPT = ROOT / "slurm" / "pretrain.sbatch"


def state_of(workplace: Workplace, name: str) -> str:
    return json.loads(workplace.selfsight("status", "--json", f"runs/{name}").stdout)[0]["state"]


def test_a_running_run_ends_with_a_checkpoint_for_good(workplace: Workplace) -> None:
    preset = workplace.preset("going", train={"steps": 100_000}, checkpoint={"every_steps": 50_000})
    job = workplace.pretrain(preset, SELFSIGHT_PREFLIGHT="0")
    probe = workplace.sbatch(f"--dependency=afterok:{job}", "--wrap=true")
    record(workplace.runs / "going", "submitted", jobs=[job], probes=[probe])
    workplace.until_step("going", 3, job)

    done = workplace.selfsight("cancel", "going")
    saved = sorted((workplace.runs / "going" / "checkpoints").glob("step-*"))
    assert len(saved) == 1, done.stdout + workplace.cluster.log(job)
    step = int(saved[0].name[5:])
    assert f"over, with the checkpoint of step {step}" in done.stdout
    assert workplace.metrics("going")[-1]["step"] == step
    assert workplace.cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING")
    assert workplace.cluster.job(job)["Restarts"] == "0"
    assert workplace.cluster.state(probe) == "CANCELLED"
    last = workplace.history("going")[-1]
    assert (last["event"], last["reason"][:12]) == ("given_up", "cancelled by")
    assert not (workplace.runs / "going" / "cancelled").exists(), "the next job of this run may come back"
    assert state_of(workplace, "going") == "cancelled"

    again = workplace.selfsight("cancel", "runs/going", check=False)
    assert again.returncode == 2
    assert "neither a job in the queue nor a process here: cancelled" in again.stderr


def test_a_run_that_waits_is_taken_out_of_the_queue(workplace: Workplace) -> None:
    job = workplace.sbatch("--hold", SCRIPT, workplace.preset("waiting"))
    record(workplace.runs / "waiting", "submitted", jobs=[job], probes=[])
    done = workplace.selfsight("cancel", "runs/waiting")
    assert f"cancelled job {job}, which waited in the queue" in done.stdout
    assert workplace.cluster.state(job) == "CANCELLED"
    assert state_of(workplace, "waiting") == "cancelled"


@pytest.mark.cluster_full
def test_now_is_without_a_checkpoint(workplace: Workplace) -> None:
    preset = workplace.preset("abrupt", train={"steps": 100_000}, checkpoint={"every_steps": 50_000})
    job = workplace.pretrain(preset, SELFSIGHT_PREFLIGHT="0")
    workplace.until_step("abrupt", 2, job)
    done = workplace.selfsight("cancel", "--now", "runs/abrupt")
    assert f"ended job {job} at once" in done.stdout
    assert workplace.cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING")
    assert state_of(workplace, "abrupt") == "cancelled"


@pytest.mark.cluster_full
def test_a_sweep_is_cancelled_by_its_folder_and_a_run_of_it_alone(workplace: Workplace) -> None:
    preset = workplace.preset("sweep", train={"steps": 100_000})
    shape = ["--nodes=1", "--tasks-per-node=1", "--time=10", "--array=seed=0,1,2", "--array-max=2"]
    workplace.selfsight("submit", preset, *shape, SELFSIGHT_PREFLIGHT="0")
    runs = [run["name"] for run in json.loads((workplace.runs / "sweep" / "sweep.json").read_text())["runs"]]
    job = workplace.history(runs[0])[0]["jobs"][0].partition("_")[0]
    for name in runs[:2]:
        workplace.until_step(name, 2, job)

    workplace.selfsight("cancel", f"runs/{runs[0]}")
    assert state_of(workplace, runs[0]) == "cancelled"
    assert state_of(workplace, runs[1]) in ("running", "starting")
    workplace.selfsight("cancel", "runs/sweep")
    assert {state_of(workplace, name) for name in runs} == {"cancelled"}
    assert workplace.cluster.run("squeue", "--noheader").stdout == ""
