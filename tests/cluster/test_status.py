"""`selfsight status` beside a real queue."""

from __future__ import annotations

import json
from typing import Any

import pytest
from workplace import ROOT, Workplace

from pretrain.survival.history import record


def status(workplace: Workplace, *arguments: str) -> dict[str, Any]:
    """By the name of the run."""
    runs = json.loads(workplace.selfsight("status", "--json", *arguments).stdout)
    return {run["run"].rpartition("/")[2]: run for run in runs}


@pytest.mark.cluster_full
def test_runs_that_wait_run_and_are_over(workplace: Workplace) -> None:
    running = workplace.preset("running", train={"steps": 100_000}, checkpoint={"every_steps": 5})
    script = ROOT / "slurm" / "pretrain.sbatch"
    job = workplace.pretrain(running, SELFSIGHT_PREFLIGHT="0")
    held = workplace.sbatch("--hold", script, workplace.preset("held"))
    record(workplace.runs / "held", "submitted", jobs=[held], probes=[], log="held.out")
    lost = workplace.sbatch("--hold", script, workplace.preset("lost"))
    record(workplace.runs / "lost", "submitted", jobs=[lost], probes=[])
    workplace.cluster.run("scancel", lost)
    workplace.until_step("running", 6, job)

    found = status(workplace)
    assert {name: run["state"] for name, run in found.items()} == {
        "held": "queued",
        "lost": "cancelled",
        "running": "running",
    }
    run = found["running"]
    assert run["step"] >= 6
    assert run["total_steps"] == 100_000
    assert run["checkpoint_step"] >= 5
    assert run["jobs"] == [f"{job} RUNNING"]
    assert run["nodes"] == "n[1-2]"
    assert run["seconds_left"] > 0
    assert "JobHeldUser" in found["held"]["why"]
    assert found["held"]["log"] == "held.out"
    text = workplace.selfsight("status").stdout
    assert f"held: {held} waits: JobHeldUser" in text

    workplace.cluster.run("scancel", job, held)
    workplace.cluster.until_idle()
    over = status(workplace, "runs/running")["running"]
    assert over["state"] in ("cancelled", "stopped"), over
    assert (over["jobs"], over["nodes"], over["seconds_left"]) == ([], "", None)
