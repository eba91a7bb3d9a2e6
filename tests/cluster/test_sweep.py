"""A sweep as one job array: a run for each element, requeued by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workplace import Workplace

from pretrain.tracking.wandb_files import read_wandb_file, wandb_files


@pytest.mark.cluster_full
def test_four_runs_of_which_two_run_at_a_time(workplace: Workplace) -> None:
    preset = workplace.preset("tiny", tracking={"wandb": "auto"})
    arrays = ("--array=optim.lr=1e-3,5e-4", "--array=seed=0,1", "--array-max=2", "--name=sweep")
    job, _ = workplace.submit(preset, *arrays, WANDB_MODE="offline")
    cluster, most = workplace.cluster, 0
    names = [run["name"] for run in json.loads((workplace.runs / "sweep" / "sweep.json").read_text())["runs"]]
    assert names == [f"sweep-lr-{lr}-seed-{seed}" for lr in ("1e-3", "5e-4") for seed in (0, 1)]

    def over() -> bool:
        nonlocal most
        states = [line.split() for line in cluster.run("squeue", "-hr", "-j", job, "-o", "%i %T").stdout.splitlines()]
        most = max(most, sum(state in ("RUNNING", "CONFIGURING") for _, state in states))
        return not states

    cluster.until(over, 300, "the array to end")
    assert most == 2
    losses = set()
    for number, name in enumerate(names):
        assert cluster.state(f"{job}_{number}") == "COMPLETED"
        assert (workplace.runs / name / "encoder" / "config.json").is_file()
        losses.add(workplace.metrics(name)[-1]["loss"])
        (file,) = [read_wandb_file(path) for path in wandb_files(workplace.runs / name)]
        assert (file.group, file.job_type, file.name) == ("sweep", "sweep", name)
        assert workplace.history(name)[0]["jobs"] == [f"{job}_{number}"]
        assert (workplace.runs / "sweep" / "logs" / f"{job}_{number}.out").is_file()
    assert len(losses) == 4


@pytest.mark.cluster_full
@pytest.mark.parametrize("element", [0, 1], ids=["an inner one", "the last one, whose job id is the array's"])
def test_an_element_that_is_asked_to_stop_comes_back_alone(workplace: Workplace, element: int) -> None:
    preset = workplace.preset("tiny", train={"steps": 60})
    job, _ = workplace.submit(preset, "--array=seed=0,1", "--name=s")
    names = ["s-seed-0", "s-seed-1"]
    for number, name in enumerate(names):
        workplace.until_step(name, 3, f"{job}_{number}")
    workplace.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_{element}")
    for number in (0, 1):
        restarts = workplace.cluster.wait(f"{job}_{number}", "COMPLETED", timeout=240)["Restarts"]
        assert (restarts == "0") == (number != element)
    for name in names:
        assert [row["step"] for row in workplace.metrics(name)] == list(range(1, 61))


@pytest.mark.cluster_full
def test_each_run_of_a_sweep_is_probed_for_itself(workplace: Workplace, labelled: Path) -> None:
    preset = workplace.preset("tiny")
    probes = (f"--probe={labelled}", "--probe-every=0.2")
    job, (behind, *beside) = workplace.submit(preset, "--array=seed=0,1", "--name=s", *probes)
    assert len(beside) == 2
    for number in (0, 1):
        workplace.cluster.wait(f"{job}_{number}", "COMPLETED", timeout=300)
        workplace.cluster.wait(f"{behind}_{number}", "COMPLETED", timeout=300)
        workplace.cluster.wait(beside[number], "COMPLETED", timeout=300)
        found = (workplace.runs / f"s-seed-{number}" / "eval").glob("probe-*.json")
        assert sorted({int(path.name.split("-")[1]) for path in found}) == [3, 6, 8]
        submitted = workplace.history(f"s-seed-{number}")[0]
        assert submitted["probes"] == [f"{behind}_{number}", beside[number]]
