"""How the machines of a run do: what one tells, and how all become rows by node."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pretrain.tracking.machine import GPU, NAMES, NODE, RANK, Machine, node_name
from pretrain.tracking.system_metrics import by_node


def test_a_machine_tells_what_it_can_and_leaves_out_the_rest(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run" / "to be made", tmp_path, first_of_node=True, gpu=None)
    machine.sample()
    values = dict(zip(NAMES, machine.sample(), strict=True))
    assert values["memory_used_gb"] > 0.1
    assert 0 < values["processes_gb"] < 1000
    assert values["run_disk_free_gb"] == pytest.approx(values["cache_disk_free_gb"], rel=0.1)
    assert values["open_files"] >= 3
    assert 0 <= values["cpu_percent"] <= 100
    assert values["network_in_mb_per_s"] >= 0
    assert all(math.isnan(values[name]) for name in GPU)


def test_only_the_first_rank_of_a_node_tells_of_it(tmp_path: Path) -> None:
    values = dict(zip(NAMES, Machine(tmp_path, tmp_path, first_of_node=False, gpu=None).sample(), strict=True))
    assert all(math.isnan(values[name]) for name in NODE)
    assert values["processes_gb"] > 0


def test_a_machine_that_tells_nothing_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 1 / 0)
    monkeypatch.setattr("psutil.Process", lambda: 1 / 0)
    assert all(math.isnan(value) for value in Machine(tmp_path, tmp_path, True, gpu=3).sample())


def test_ranks_become_nodes() -> None:
    nothing = [math.nan] * len(NAMES)
    of_node = [*map(float, range(len(NODE))), 2.0, 10.0, *[50.0] * len(GPU)]
    of_rank = [*[math.nan] * len(NODE), 3.0, 5.0, *[60.0] * len(GPU)]
    values = by_node(["a", "a", "b"], [of_node, of_rank, nothing])
    assert values["system/a/cpu_percent"] == 0.0
    assert values["system/a/processes_gb"] == 5.0
    assert values["system/a/open_files"] == 15.0
    assert values["system/a/gpu0/power_w"] == 50.0
    assert values["system/a/gpu1/power_w"] == 60.0
    assert not any("/b/" in name for name in values)
    assert len(values) == len(NODE) + len(RANK) + 2 * len(GPU)


@pytest.mark.parametrize(
    ("name", "shown"), [("gpu-07", "gpu-07"), ("a.b/c d", "a_b_c_d"), ("ä" * 80, "_" * 48), ("", "node")]
)
def test_a_nodes_name_is_fit_for_a_dashboard(monkeypatch: pytest.MonkeyPatch, name: str, shown: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "")
    monkeypatch.setenv("SLURMD_NODENAME", name)
    assert node_name() == shown
