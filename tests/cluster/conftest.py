"""One SLURM cluster for all tests of this folder, and what a test needs to train on it.

    make test-cluster        all of them
    make test-cluster-core   those not marked `cluster_full`: what CI runs

They start only where asked for (`-m cluster`), one after the other: the cluster has the cores of this machine.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from minicluster import MiniCluster, missing
from tiny import write_shards
from workplace import ROOT, Workplace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    """Three nodes of eight (pretended) cores and two (pretended) GPUs; jobs run this interpreter and this checkout."""
    if absent := missing():
        pytest.skip(f"no SLURM here ({', '.join(absent)} not found); on Debian: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("cluster-jobs")
    (folder / "tmp").mkdir()
    extra = {
        "SELFSIGHT_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "SELFSIGHT_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "WANDB_MODE": "disabled",
    }
    with MiniCluster(extra=extra) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancel what a failed test left running: the next one finds idle nodes."""
    yield
    running: MiniCluster | None = (getattr(request.node, "funcargs", None) or {}).get("cluster")
    if running is not None:
        if jobs := running.run("squeue", "--noheader", "--format=%A").stdout.split():
            running.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
            running.run("scancel", *jobs, check=False)
        running.until_idle()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of 32x32 px in two shards."""
    folder = tmp_path_factory.mktemp("cluster-shards")
    write_shards(folder)
    return folder


@pytest.fixture
def labelled(shards: Path, tmp_path: Path) -> Path:
    """The shards with a val split, for probes, at a path that is no plain word."""
    folder = tmp_path / "labelled data; $(exit 3)"
    folder.mkdir()
    shutil.copy(shards / "train-000000.tar", folder)
    shutil.copy(shards / "train-000001.tar", folder / "val-000000.tar")
    return folder


@pytest.fixture
def workplace(cluster: MiniCluster, tmp_path: Path, shards: Path) -> Iterator[Workplace]:
    """A folder to submit from."""
    yield Workplace(cluster, tmp_path, shards)
    if os.environ.get("KEEP_RUNS") is None:
        shutil.rmtree(tmp_path, ignore_errors=True)
