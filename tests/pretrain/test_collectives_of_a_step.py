"""How often ranks talk in a step: a number that depends neither on the parameters nor on their groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import column, run_all
from tiny import config_data
from torch import nn

from pretrain.engines.reduction import MOST_BUCKETS, GradientReduction

#: Of each method on two ranks, by ZeRO stage: one for each bucket of gradients (one here, four at most), one that tells
#: how the step went; from stage 1 on the norm and the new weights, in stage 3 gathered before student and teacher run;
#: and one for what a method counts over all ranks, four for Sinkhorn-Knopp.
EXPECTED: dict[str, dict[int, int]] = {
    "mae": {0: 2, 1: 4, 3: 5},
    "mim": {1: 5},
    "dino": {1: 5},
    "sinkhorn": {0: 6, 2: 8, 3: 8},  # with iBOT and KoLeo
    "vqkd": {1: 5},
    "dvae": {1: 5},
}
DEEPER = ("mae", "sinkhorn")


def configuration(name: str, stage: int, depth: int, shards: Path, runs: Path) -> dict[str, Any]:
    method = "dino" if name == "sinkhorn" else name
    quiet = {"log_every_steps": 100, "pictures_every_steps": 0, "wandb": "disabled"}
    data = config_data(
        method,
        "vit",
        shards,
        runs,
        engine={"zero_stage": stage, "precision": "bf16"},
        train={"steps": 5},
        optim={"layer_decay": 0.65} if depth > 2 and method != "dvae" else {},
        tracking=quiet,
        checkpoint={"every_steps": 100},
        diagnostics={"knn_every_epochs": None, "inspect_every_steps": 0},
    )
    if data["encoder"] is not None:
        data["encoder"]["depth"] = depth
    if name == "sinkhorn":
        data["method"] |= {"centering": "sinkhorn", "koleo_weight": 0.1, "ibot": {"separate_head": True}}
    return data | {"name": f"{name}-{stage}-{depth}"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """By method, stage and depth of the encoder: the collectives of each step outside of log steps, in bf16, and what
    types of numbers they carry."""
    folder = tmp_path_factory.mktemp("counted")
    cells = {
        (name, stage, depth): configuration(name, stage, depth, shards, folder)
        for name in EXPECTED
        for stage in EXPECTED[name]
        for depth in ((2, 5) if name in DEEPER and stage else (2,))
    }
    run_all([*cells.values()], 2, folder, worker="counting_worker.py")
    found = {key: json.loads((folder / data["name"] / "collectives.json").read_text()) for key, data in cells.items()}
    return {key: {**each, "steps": each["steps"][2:-1]} for key, each in found.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_step_has_few_collectives(told: dict[tuple[str, int, int], dict[str, Any]], name: str) -> None:
    found = {stage: {sum(step.values()) for step in told[name, stage, 2]["steps"]} for stage in EXPECTED[name]}
    assert found == {stage: {number} for stage, number in EXPECTED[name].items()}
    assert max(EXPECTED[name].values()) + MOST_BUCKETS - 1 < 12


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in DEEPER for stage in EXPECTED[name] if stage])
def test_neither_parameters_nor_groups_count(
    told: dict[tuple[str, int, int], dict[str, Any]], name: str, stage: int
) -> None:
    """More than twice as many blocks, and with layer decay two groups for each of them."""
    assert told[name, stage, 5]["steps"] == told[name, stage, 2]["steps"]


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in DEEPER for stage in EXPECTED[name]])
def test_nothing_is_exchanged_in_bf16(told: dict[tuple[str, int, int], dict[str, Any]], name: str, stage: int) -> None:
    """Gradients of arithmetic in bf16, and under ZeRO 3 weights, too."""
    types = set(told[name, stage, 2]["types"])
    assert "torch.float32" in types
    assert not types & {"torch.bfloat16", "torch.float16"}


@pytest.mark.parametrize("stage", [0, 1])
def test_several_buckets_learn_what_one_does(stage: int, shards: Path, tmp_path: Path) -> None:
    runs = []
    for least in (2**22, 100):
        data = config_data("dino", "vit", shards, tmp_path, engine={"zero_stage": stage})
        data["method"] |= {"ibot": {}}  # whose head is used twice in a pass
        data["train"] = {"steps": 5, "batch_size": 8, "grad_accum_steps": 2}
        runs.append({**data, "name": str(least), "least_bucket": least})
    run_all(runs, 2, tmp_path, worker="faulty_worker.py")
    one, several = (column(run, "loss") for run in runs)
    assert several == pytest.approx(one, rel=1e-6)


def test_a_large_model_has_four_buckets_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.engines.reduction.LEAST_BUCKET", 100)
    sizes = [7, 900, 3, 3, 400, 650, 1, 36]
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    places = [(p, sum(sizes[:number])) for number, p in enumerate(parameters)]
    reduction = GradientReduction(places, sum(sizes) + 8, lambda: True, world_size=1)  # 8 of padding
    covered = [bucket.stretch for bucket in reduction._buckets]
    assert len(covered) <= MOST_BUCKETS
    assert sum(map(len, covered)) == sum(sizes) + 8
    sum((number + 1) * p.sum() for number, p in enumerate(parameters) if number != 4).backward()  # one has no gradient
    reduction.finish()
    for number, parameter in enumerate(parameters):
        assert parameter.grad.eq(0.0 if number == 4 else number + 1).all()
    assert reduction.flat.sum() == sum((n + 1) * size for n, size in enumerate(sizes) if n != 4)
