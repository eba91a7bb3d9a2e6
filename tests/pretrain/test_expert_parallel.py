"""Experts divided over ranks learn what one process learns, and go on from each other's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import killed_at_2
from test_train import column, run_all
from tiny import config_data

from pretrain.config.load import parse_config
from pretrain.encoders.saved import load_encoder

SMALL = {
    "family": "swin_moe", "dim": 8, "depths": [1, 2], "heads": [1, 2], "patch": 4, "window": 4, "experts": 2,
    "group": 1, "mlp_ratio": 2.0, "drop_path": 0.2, "expert_blocks": [[0], [1]], "balance_weight": 0.1,
    "fc2_bias": True,
}  # fmt: skip


def configuration(name: str, shards: Path, runs: Path, divided: bool, **changes: Any) -> dict[str, Any]:
    """DINO in 4 steps: a student with places that are counted, a teacher without, crops of two sizes."""
    data = config_data("dino", "swin", shards, runs, train={"steps": 4, "batch_size": 8, "grad_accum_steps": 2})
    data |= {"name": name, "encoder": {**SMALL, **changes}, "checkpoint": {"every_steps": 2}}
    data["optim"]["clip_grad"] = 0.05  # below every norm
    data["engine"]["expert_parallel"] = divided
    data["tracking"]["pictures_every_steps"] = 4
    return data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, dict[str, Any]]:
    """Of one rank, of two that divide the experts, and without a limit on places; one rank that goes on from the second
    step of two, and four (of which two hold each expert) from that of one."""
    folder = tmp_path_factory.mktemp("experts")
    unlimited = {"capacity_factor": None, "router": "cosine"}
    cells = {
        "one": configuration("one", shards, folder, True),
        "two": configuration("two", shards, folder, True),
        "all_one": configuration("all_one", shards, folder, False, **unlimited),
        "all_two": configuration("all_two", shards, folder, True, **unlimited),
    }
    run_all([cells["two"], cells["all_two"]], 2, folder)
    cells["one_on"] = killed_at_2(folder / "two", folder / "one_on", cells["two"])
    run_all([cells["one"], cells["all_one"], cells["one_on"]], 1, folder)
    cells["four_on"] = killed_at_2(folder / "one", folder / "four_on", cells["one"])
    cells["four_on"]["train"] = {**cells["one"]["train"], "grad_accum_steps": 1}
    run_all([cells["four_on"]], 4, folder)
    return cells


@pytest.mark.parametrize(("name", "alone"), [("two", "one"), ("all_two", "all_one")])
def test_ranks_that_divide_the_experts_learn_what_one_does(
    runs: dict[str, dict[str, Any]], name: str, alone: str
) -> None:
    together, single = runs[name], runs[alone]
    assert column(together, "ids_digest") == column(single, "ids_digest")
    for metric in ("loss", "method_loss", "moe_balance", "moe_dropped", "moe_load/block_2_expert_1", "teacher_sum"):
        if metric in single:
            assert column(together, metric) == pytest.approx(column(single, metric), rel=2e-5), metric
    assert column(together, "grad_norm") == pytest.approx(column(single, "grad_norm"), rel=1e-4)
    assert column(together, "loss")[-1] != column(together, "loss")[0]
    saved, expected = (load_encoder(Path(run["runs"]) / run["name"] / "encoder")[0] for run in (together, single))
    for (key, value), other in zip(saved.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=2e-6, msg=key)
    dropped = column(single, "moe_dropped")
    assert (max(dropped) > 0) == (alone == "one")


@pytest.mark.parametrize(("name", "whole"), [("one_on", "two"), ("four_on", "one")])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(
    runs: dict[str, dict[str, Any]], name: str, whole: str
) -> None:
    assert column(runs[name], "loss")[-2:] == pytest.approx(column(runs[whole], "loss")[-2:], rel=2e-5)
    assert column(runs[name], "grad_norm")[-2:] == pytest.approx(column(runs[whole], "grad_norm")[-2:], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": {"zero_stage": 1}}, "is with engine.zero_stage=0, and it is 1"),
        ({"encoder": {"family": "vit", "dim": 32, "depth": 1, "heads": 2, "patch": 4}}, "encoder vit has none"),
    ],
)
def test_what_cannot_be_divided_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = configuration("refused", tmp_path, tmp_path, True)
    data["engine"] |= change.get("engine", {})
    data["encoder"] = change.get("encoder", data["encoder"])
    with pytest.raises(ValueError, match=message):
        parse_config(data)
