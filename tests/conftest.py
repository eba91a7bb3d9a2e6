"""What every test starts from: no launcher's variables, no network, a cache of its own."""

from __future__ import annotations

import os
from collections import Counter

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the suite's processes share the cores
os.environ["WANDB_MODE"] = "offline"
#: Files of few tests that take minutes. They are begun first: the last to end has nobody beside it.
LONGEST = ("tests/gpu/test_kit.py", "tests/pretrain/test_collectives_of_a_step.py")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "SLURM_", "TORCHELASTIC_")


@pytest.hookimpl(trylast=True)  # when it is known which tests run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which file a process of `make test` takes next: the longest, then by their number of tests."""
    if hasattr(config, "workerinput"):
        files = [item.nodeid.partition("::")[0] for item in items]
        tests = Counter(files)
        order = sorted(range(len(items)), key=lambda place: (files[place] not in LONGEST, -tests[files[place]]))
        items[:] = [items[place] for place in order]


@pytest.fixture
def patient_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for wandb on a machine with other work: what a training would go on without is here what is looked at."""
    monkeypatch.setattr("pretrain.tracking.wandb_run.FINISH_SECONDS", 120.0)
    monkeypatch.setattr("pretrain.tracking.wandb_run.INIT_SECONDS", 120)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A suite that runs inside a batch job must not take itself for one of its ranks."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
