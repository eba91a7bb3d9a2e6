from __future__ import annotations

import os

import pytest

from data_pipelines.cores import cores_per_process


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8"}, 8),  # bound by srun
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "3"}, 3),  # not bound, but told
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "8"}, 4),  # torchrun in a batch script shares them all
    ],
)
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], cores: int) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cores_per_process() == cores
