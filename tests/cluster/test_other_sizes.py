"""A run that continues on another number of nodes and under another ZeRO stage, at the same global batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from minicluster import MiniCluster
from workplace import Workplace

from pretrain.checkpoints.folder import CheckpointFolder, read_state
from pretrain.config import CheckpointConfig

STEPS = 12
RUN: dict[str, Any] = {
    "train": {"steps": STEPS, "batch_size": 12},
    "checkpoint": {"every_steps": 4, "keep_last": 9},
    "engine": {"device": "cpu", "threads": 1, "zero_stage": 1},
}


def back_to(step: int, run: Path, runs: Path) -> None:
    """A copy of a run in another folder, as if it had ended after a step."""
    copy = runs / run.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "encoder")
    for path in CheckpointFolder(copy, CheckpointConfig()).all():
        if read_state(path).step > step:
            shutil.rmtree(path)


def column(runs: Path, name: str) -> list[Any]:
    return [json.loads(line)[name] for line in (runs / "moved" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.cluster_full
def test_from_two_nodes_to_three_to_one_and_from_zero_1_to_2(workplace: Workplace, cluster: MiniCluster) -> None:
    preset = workplace.preset("moved", method="dino", **RUN)
    started = workplace.runs
    cluster.wait(workplace.pretrain(preset), "COMPLETED", timeout=300)
    for step, nodes, stage in ((4, 3, 2), (8, 1, 1)):
        runs = workplace.folder / f"on-{nodes}"
        back_to(step, started / "moved", runs)
        job = workplace.pretrain(preset, f"--nodes={nodes}", overrides=(f"runs={runs}", f"engine.zero_stage={stage}"))
        cluster.wait(job, "COMPLETED", timeout=300)
        assert f"step-{step:08d}" in workplace.printed(job)
        last = read_state(CheckpointFolder(runs / "moved", CheckpointConfig()).all()[-1])
        assert (last.step, last.world_size, last.zero_stage) == (STEPS, nodes, stage)
        assert column(runs, "step") == list(range(1, STEPS + 1))
        assert column(runs, "ids_digest") == column(workplace.runs, "ids_digest")
        assert column(runs, "loss") == pytest.approx(column(workplace.runs, "loss"), rel=1e-4)
        started = runs
