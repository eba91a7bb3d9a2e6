"""Released weights trained on: which parts learn and when, what is taken along, the same on any ranks and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cells import finish
from test_train import column, run_all
from tiny import NORMALISATION, build, config_data, random_batch

from pretrain.checkpoints.exports import export_of
from pretrain.checkpoints.pieces import MOMENTS, Pieces
from pretrain.checkpoints.saving import piece_name
from pretrain.config.load import ConfigError, parse_config
from pretrain.continuing.config import ContinuingConfig
from pretrain.encoders.saved import load_encoder
from pretrain.engines.optim import build_optimizer, set_rates
from pretrain.engines.schedules import Cosine
from pretrain.run import pretrain

LORA = {"rank": 2, "alpha": 4.0, "layers": ["qkv", "proj", "fc1", "fc2"]}


def continued(source: Path, folder: Path, name: str = "on", method: str = "dino", **continuing: Any) -> dict[str, Any]:
    data = config_data(method, "vit", Path(data_of(source)), folder)
    data["encoder"]["pool"] = "class"
    return {**data, "name": name, "init_from": str(source), "continuing": continuing}


def data_of(source: Path) -> str:
    return str(yaml.safe_load((source / "config.yaml").read_text())["data"]["train"])


def test_heads_learn_first_and_the_encoders_rate_rises(source: Path, tmp_path: Path) -> None:
    method = build(parse_config(continued(source, tmp_path, train_blocks=1)))
    assert method.encoder is not None
    learned = {name for name, p in method.encoder.named_parameters() if p.requires_grad}
    assert {name for name in learned if "blocks" in name} == {
        name for name, _ in method.encoder.named_parameters() if ".blocks.1." in name
    }
    continuing = ContinuingConfig(heads_first_steps=3, ramp_steps=4)
    config = parse_config(continued(source, tmp_path))
    groups = build_optimizer(method, config.optim, continuing).rules
    of = {name: group for group in groups for name in group["names"]}
    last = next(name for name in of if name.startswith("encoder.") and name.endswith("blocks.1.mlp.fc1.weight"))
    brought, head = of[last], of["head.mlp.0.weight"]
    rates, heads = [], []
    for step in range(9):
        set_rates(groups, step, Cosine(1.0, 1.0, 10), Cosine(0.1, 0.1, 10))
        rates.append(brought["lr"])
        heads.append(head["lr"])
        assert brought["weight_decay"] == (0.0 if step < 3 else 0.1)
    assert rates == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert heads == [1.0] * 9


@pytest.mark.parametrize("name", ["mae", "mim", "dino", "ijepa", "lejepa"])
def test_changes_are_merged_on_export(name: str, source: Path, tmp_path: Path) -> None:
    """Trained or not, what is exported gives what the run's encoder gives; slow averages have changes of their own."""
    config = parse_config(continued(source, tmp_path, method=name, lora=LORA))
    method = build(config).train()
    assert method.encoder is not None
    of_encoder = {key for key, p in method.encoder.named_parameters() if p.requires_grad}
    assert all(key.startswith("low_rank.") or key == "mask_token" for key in of_encoder)
    assert sum(key.startswith("low_rank.") for key in of_encoder) == 2 * 4 * 2
    result = method(random_batch(config), 0)
    result["loss"].backward()
    grown = [key for key, p in method.encoder.low_rank.named_parameters() if p.grad is not None and p.grad.abs().sum()]
    assert any("up" in key for key in grown)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (method, *(slow for slow, _ in method.ema_pairs())):
            for key, p in module.named_parameters():
                if "low_rank" in key and key.endswith("up"):
                    p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    method.eval()
    frozen = method.frozen_encoder()
    assert frozen is not None
    export = export_of(method, config, NORMALISATION, 1, 0.1)
    export.write(tmp_path / "encoder", export.module.state_dict())
    loaded, _ = load_encoder(tmp_path / "encoder")
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        ours, theirs = frozen(images).tokens, loaded(images).tokens
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)
    plain = parse_config({**continued(source, tmp_path, method=name), "continuing": None})
    encoder = build(plain).encoder
    assert encoder is not None
    assert load_file(tmp_path / "encoder" / "model.safetensors").keys() == encoder.inner().state_dict().keys()


HELD = {"feature_weight": 1.0, "gram_weight": 1.0}


@pytest.mark.parametrize(
    "continuing",
    [
        {"lora": LORA},
        pytest.param({"train_blocks": 1, "ramp_steps": 3, "heads_first_steps": 1}, marks=pytest.mark.slow),
        pytest.param(HELD, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_micro_batches_learn_what_one_does(continuing: dict[str, Any], source: Path, tmp_path: Path) -> None:
    cells = {}
    for ranks, accumulation, stage in ((1, 1, 0), (1, 2, 1), (2, 1, 2), (2, 2, 3)):
        data = continued(source, tmp_path, f"{ranks}-{stage}", measure_every_epochs=None, **continuing)
        data["engine"] = {**data["engine"], "zero_stage": stage}
        data["train"] = {"steps": 6, "batch_size": 16, "grad_accum_steps": accumulation}
        data["encoder"] = {**data["encoder"], "drop_path": 0.3}
        cells[ranks, stage] = data
    for ranks in (1, 2):
        run_all([data for key, data in cells.items() if key[0] == ranks], ranks, tmp_path)
    alone = cells.pop((1, 0))
    weights = load_file(tmp_path / "1-0" / "encoder" / "model.safetensors")
    for key, data in cells.items():
        assert column(data, "ids_digest") == column(alone, "ids_digest")
        for name in ("loss", "grad_norm"):
            assert column(data, name) == pytest.approx(column(alone, name), rel=1e-4), (key, name)
        theirs = load_file(tmp_path / data["name"] / "encoder" / "model.safetensors")
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, atol=1e-4, rtol=1e-3, msg=f"{key} {name}")


def test_a_killed_run_goes_on_to_the_last_bit(source: Path, tmp_path: Path) -> None:
    data = continued(source, tmp_path / "runs", "cell", lora=LORA, ramp_steps=1, measure_every_epochs=None, **HELD)
    data |= {"checkpoint": {"every_steps": 1}, "train": {"steps": 2, "batch_size": 4}}
    finish(data, tmp_path, "encoder")


def test_the_optimizers_moments_come_along(source: Path, tmp_path: Path) -> None:
    """The first step then is not that of moments of zero, and they are counted on from the source's steps."""
    results = {}
    for optimizer in (False, True):
        data = continued(source, tmp_path, f"{optimizer}", optimizer=optimizer)
        data |= {"checkpoint": {"every_steps": 1}, "train": {"steps": 1, "batch_size": 8}}
        results[optimizer] = pretrain(parse_config(data)) / "checkpoints" / "step-00000001" / piece_name(0, 1)
    last = source / "checkpoints" / "step-00000008" / piece_name(0, 1)
    with Pieces([last]) as before, Pieces([results[False]]) as fresh, Pieces([results[True]]) as taken:
        assert max(fresh.steps.values()) == 1
        assert max(taken.steps.values()) == 9
        name = next(key for key in before.shapes if key.startswith("encoder.") and key.endswith("0.mlp.fc1.weight"))
        numel = taken.whole(name).numel()
        for moment, beta in zip(MOMENTS, (0.9, 0.999), strict=True):
            old, new, added = (p.read(moment, name, 0, numel) for p in (before, taken, fresh))
            torch.testing.assert_close(new, beta * old + added, rtol=1e-4, atol=1e-9)
    data = continued(source, tmp_path, "exported", optimizer=True) | {"init_from": str(source / "encoder")}
    with pytest.raises(ValueError, match="holds no optimizer's state"):
        pretrain(parse_config(data))


@pytest.mark.parametrize(
    ("continuing", "told"),
    [
        ({"lora": LORA, "train_blocks": 1}, "set one of them to null"),
        ({"optimizer": True, "heads": False}, "heads=true along"),
        ({"optimizer": True, "heads_first_steps": 1}, "set optimizer=false"),
        ({"heads_first_steps": 4, "ramp_steps": 4}, "8 steps of train.steps = 8"),
    ],
)
def test_what_cannot_be_is_refused(continuing: dict[str, Any], told: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config(continued(source, tmp_path, **continuing))


def test_it_needs_weights_to_go_on_from(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_from is null"):
        parse_config(continued(source, tmp_path) | {"init_from": None})
    with pytest.raises(ValueError, match="train_blocks is 3, and the encoder has 2"):
        build(parse_config(continued(source, tmp_path, train_blocks=3)))
