"""`selfsight submit` against a real SLURM: what is refused before anything is queued, and what runs afterwards."""

from __future__ import annotations

import errno
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from workplace import Workplace

from launch.cluster.resources import Resources
from launch.cluster.site import Site
from launch.cluster.submit import Plan, Request, plan_submission, queue
from pretrain.tracking.wandb_files import read_wandb_file, wandb_files

OFFLINE = {"WANDB_MODE": "offline"}


def jobs_of(workplace: Workplace) -> list[str]:
    return workplace.cluster.run("squeue", "--noheader", "--format=%i").stdout.split()


def test_mae_and_dino_train_on_two_nodes_and_are_probed(workplace: Workplace, labelled: Path) -> None:
    waiting = []
    for method in ("mae", "dino"):
        preset = workplace.preset(method, method, tracking={"wandb": "auto"})
        waiting.append((method, *workplace.submit(preset, "--nodes=2", f"--probe={labelled}", **OFFLINE)))
    for name, job, probes in waiting:
        workplace.cluster.wait(job, "COMPLETED", timeout=240)
        workplace.cluster.wait(*probes, "COMPLETED", timeout=240)
        assert workplace.cluster.job(job)["NumNodes"] == "2"
        run = workplace.runs / name
        assert [row["step"] for row in workplace.metrics(name)] == list(range(1, 9))
        (result,) = (run / "eval").glob("probe-8-*.json")
        measured = json.loads(result.read_text())["rows"]["pretrained"]["linear"]["top1"]
        files = [read_wandb_file(path) for path in wandb_files(run)]
        assert len({file.id for file in files}) == 1, "all of a run is one wandb run"
        steps = sorted(row.get("step", row.get("_step")) for file in files for row in file.history if "loss" in row)
        assert steps == list(range(1, 9))
        told = [file.summary["probe/linear"] for file in files if "probe/linear" in file.summary]
        told += [row["probe/linear"] for file in files for row in file.history if "probe/linear" in row]
        assert told
        assert set(told) == {measured}
        submitted = next(event for event in workplace.history(name) if event["event"] == "submitted")
        assert submitted["jobs"] == [job]
        assert submitted["probes"] == probes
        assert Path(submitted["log"]).is_file()
        assert (run / "jobs" / f"pretrain-{job}.sbatch").is_file()


def test_what_the_cluster_has_not_is_refused_and_nothing_is_queued_or_written(workplace: Workplace) -> None:
    preset = workplace.preset("tiny")
    before = sorted(workplace.folder.rglob("*"))
    for options, message in (
        (("--partition=mian",), "no partition 'mian'; did you mean main? Partitions here: main, scavenge, short"),
        (("--time=2:00:00",), "--time 2:00:00 is beyond what partition main allows, 01:00:00"),
        (("--nodes=4",), "--nodes 4: partition main has 3"),
        (("--gpus-per-node=3",), "0 nodes of partition main have so many"),
        (("--gpus-per-node=a100:1",), "GPUs of its nodes: 2"),
        (("--nodes=2", "--cpus-per-task=9"), "give at most 8"),
        (("--nodes=3",), "train.batch_size 8 (global) does not divide over 3 ranks"),
        (("--nodes=2", "--micro-batch=3"), "Nearest micro-batches: 2 or 4"),
        (("seed=x",), "seed"),
    ):  # fmt: skip
        done = workplace.selfsight("submit", preset, *options, check=False)
        assert done.returncode == 2, done.stdout
        assert message in " ".join(done.stderr.split()), done.stderr
    done = workplace.selfsight("submit", preset, "--nodes=2", "--dry-run")
    assert "#SBATCH --nodes=2" in done.stdout
    assert "# global batch: 8 = 2 ranks x 4 x 1 accumulated" in done.stdout
    assert sorted(workplace.folder.rglob("*")) == before
    assert jobs_of(workplace) == []


@pytest.mark.cluster_full
def test_a_run_is_queued_once_and_its_probe_goes_with_it(workplace: Workplace, labelled: Path) -> None:
    preset = workplace.preset("tiny")
    workplace.sbatch("--nodes=3", "--exclusive", "--wrap=sleep 600", "--output=/dev/null")  # so that it has to wait
    job, (probe,) = workplace.submit(preset, f"--probe={labelled}")
    assert workplace.cluster.job(probe)["Dependency"].startswith(f"afterok:{job}")
    again = workplace.selfsight("submit", preset, check=False)
    assert again.returncode == 2
    assert f"has job {job} in the queue already (PENDING)" in " ".join(again.stderr.split())
    workplace.cluster.run("scancel", job)
    # what waits for a job that will never be COMPLETED does not wait for ever
    workplace.cluster.wait(probe, "CANCELLED", timeout=60)
    other, _ = workplace.submit(preset)
    assert other not in (job, probe)


@pytest.mark.cluster_full
def test_of_two_who_submit_a_run_at_a_time_one_is_told_to_wait(workplace: Workplace) -> None:
    preset = workplace.preset("tiny")
    workplace.sbatch("--nodes=3", "--exclusive", "--wrap=sleep 600", "--output=/dev/null")
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: workplace.selfsight("submit", preset, "--time=10", check=False), range(2)))
    assert sorted(done.returncode for done in both) == [0, 2], [done.stderr for done in both]
    assert len(jobs_of(workplace)) == 2
    assert len(workplace.history("tiny")) == 1


def test_if_a_later_part_is_refused_nothing_stays_queued(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cluster import submit
    from launch.cluster.probes import ProbeJob

    preset = workplace.preset("tiny")
    monkeypatch.chdir(workplace.folder)
    for name, value in workplace.cluster.env.items():
        monkeypatch.setenv(name, value)
    request = Request(str(preset), (), Resources(time="10"), Site(), workplace.cluster.env["SELFSIGHT_PYTHON"], ("x",))
    plan = plan_submission(request)

    def taken_back(plan: Plan, why: str) -> None:
        with pytest.raises(OSError, match=why) as refused:
            queue(plan)
        job = re.search(r"what had been queued, (\d+), was taken back", str(refused.value))
        assert job is not None
        workplace.cluster.wait(job[1], "CANCELLED", "CANCELLED+", "COMPLETING", timeout=30)
        assert workplace.history("tiny") == []

    taken_back(replace(plan, probes=(ProbeJob("#!/bin/bash\n#SBATCH --partition=gone\ntrue\n"),)), "partition")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(submit, "record", full)
    taken_back(plan, "No space left")


@pytest.mark.cluster_full
def test_milestones_are_probed_while_training_runs(workplace: Workplace, labelled: Path) -> None:
    preset = workplace.preset("tiny")
    job, probes = workplace.submit(preset, "--nodes=2", f"--probe={labelled}", "--probe-every=0.2")
    for one in (job, *probes):
        workplace.cluster.wait(one, "COMPLETED", timeout=300)
    steps = sorted({int(path.name.split("-")[1]) for path in (workplace.runs / "tiny" / "eval").glob("probe-*.json")})
    assert steps == [3, 6, 8]


@pytest.mark.cluster_full
def test_a_follower_whose_training_is_cancelled_ends(workplace: Workplace, labelled: Path) -> None:
    preset = workplace.preset("tiny", train={"steps": 100_000})
    job, (behind, beside) = workplace.submit(preset, f"--probe={labelled}", "--probe-every=100")
    workplace.until_step("tiny", 10, job)
    workplace.cluster.run("scancel", job)
    workplace.cluster.wait(behind, "CANCELLED", timeout=60)
    workplace.cluster.wait(beside, "COMPLETED", timeout=300)
    told = workplace.selfsight("submit", preset, "--dry-run").stdout
    assert re.search(r"# continues \S+/runs/tiny from its checkpoint of step \d+", told)
