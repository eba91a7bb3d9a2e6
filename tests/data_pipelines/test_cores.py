from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipelines import cores as cores_module
from data_pipelines.cores import cores_per_process, cpu_quota, sleep_at_barriers

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def eight_of_sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STEP, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(cores_module, "_OWN_CGROUPS", Path("/nowhere"))


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        (STEP | {"SLURM_CPUS_PER_TASK": "8"}, 8),  # bound by srun
        (STEP | {"SLURM_CPUS_PER_TASK": "3"}, 3),  # not bound, but told
        (STEP, 8),  # bound, and not told
        # one srun task that starts ranks of its own, by torchrun or `selfsight launch`: they share its cores
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "8"}, 4),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "8"}, 4),
    ],
)
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], cores: int) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cores_per_process() == cores


def control_groups(folder: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    """A process in the control groups `own`, with these files below the file system of control groups."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    (folder / "own").write_text(own)
    monkeypatch.setattr(cores_module, "_CGROUPS", folder)
    monkeypatch.setattr(cores_module, "_OWN_CGROUPS", folder / "own")


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/\n", {}, None),
        ("", {"cpu.max": "250000 100000"}, None),
        # the tightest of nested groups counts, wherever it is
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "cpu.max": "400000 100000"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 50000", "a/cpu.max": "300000 100000"}, 2.0),
        # in a container, the path is the host's and only the root is there
        ("0::/docker/1f\n", {"cpu.max": "150000 100000"}, 1.5),
        # version 1, and version 1 beside an empty version 2
        ("3:cpu,cpuacct:/job\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000"}, None),
        (
            "4:memory:/job\n3:cpu,cpuacct:/job\n0::/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            4.0,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("1:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "junk"}, None),
        ("0::/\n", {"cpu.max": "0 0"}, None),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], quota: float | None
) -> None:
    control_groups(tmp_path, monkeypatch, own, files)
    assert cpu_quota() == quota


@pytest.mark.parametrize(
    ("environ", "quota", "cores"),
    [
        ({}, 250_000, 2),
        ({}, 50_000, 1),
        ({}, 1_600_000, 8),  # no more than the affinity
        ({"LOCAL_WORLD_SIZE": "2"}, 600_000, 3),
        ({"LOCAL_WORLD_SIZE": "4"}, 600_000, 1),
        (STEP | {"SLURM_CPUS_PER_TASK": "3"}, 400_000, 2),
        (STEP | {"SLURM_CPUS_PER_TASK": "3"}, 800_000, 3),
    ],
)
def test_a_quota_is_shared_by_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], quota: int, cores: int
) -> None:
    control_groups(tmp_path, monkeypatch, "0::/a\n", {"a/cpu.max": f"{quota} 100000"})
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cores_per_process() == cores


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "200"}])
def test_threads_sleep_where_they_wait_unless_the_user_says_how(own: dict[str, str]) -> None:
    kept = dict(own)
    sleep_at_barriers(kept)
    assert kept == own
    environ = {"OMP_NUM_THREADS": "2"}
    sleep_at_barriers(environ)
    assert environ == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
