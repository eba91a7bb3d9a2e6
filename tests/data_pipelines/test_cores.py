from __future__ import annotations

import os

import pytest

from data_pipelines.cores import cores_per_process

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def eight_of_sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STEP, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


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
