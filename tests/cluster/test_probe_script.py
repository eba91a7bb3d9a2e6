"""What `slurm/probe.sbatch` does when it is told to end; the probe is a line of bash here, SLURM is real."""

from __future__ import annotations

import pytest
from workplace import ROOT, Workplace

LISTENS = "trap 'exit 85' TERM USR1; echo begun; while :; do sleep 0.1; done"


def begun(workplace: Workplace, probe: str, *options: str) -> str:
    """A job whose probe is a line of bash, as soon as it has said `begun`."""
    python, cluster = workplace.folder / "python", workplace.cluster
    python.write_text(f"#!/bin/bash\n{probe}\n")
    python.chmod(0o755)
    script = (ROOT / "slurm" / "probe.sbatch", workplace.runs / "run", "--data", "shards")
    own = [option for option in options if option == "--follow"]
    rest = [option for option in options if option != "--follow"]
    job = workplace.sbatch(*rest, *script, *own, env={"SELFSIGHT_PYTHON": str(python)})
    cluster.until(lambda: "begun" in cluster.log(job), 60, "the probe to begin", lambda: cluster.log(job))
    return job


def test_a_follower_that_is_cancelled_stays_away(workplace: Workplace) -> None:
    job = begun(workplace, LISTENS, "--follow")
    workplace.cluster.run("scancel", job)
    workplace.cluster.until_idle()
    assert (workplace.cluster.state(job), workplace.cluster.job(job)["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.cluster_full
def test_a_follower_near_its_time_limit_comes_back(workplace: Workplace) -> None:
    job = begun(workplace, f"((${{SLURM_RESTART_COUNT:-0}})) && exit 0; {LISTENS}", "--follow")
    workplace.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert workplace.cluster.wait(job, "COMPLETED")["Restarts"] == "1"


@pytest.mark.cluster_full
def test_a_probe_that_is_preempted_is_done_again_and_one_that_fails_then_is_not(workplace: Workplace) -> None:
    cpus = f"--cpus-per-task={workplace.cluster.cpus}"
    probe = "((${SLURM_RESTART_COUNT:-0})) && exit 1; echo begun; exec sleep 1000"
    job = begun(workplace, probe, "--partition=scavenge", cpus)
    urgent = workplace.sbatch("--partition=main", "--nodes=3", cpus, "--wrap=sleep 1")
    workplace.cluster.wait(urgent, "COMPLETED", timeout=120)
    assert workplace.cluster.wait(job, "FAILED")["Restarts"] == "1"
