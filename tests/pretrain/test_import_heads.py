"""Heads and decoders that an import brings along, and a run that goes on with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_import import imported, mae_state, vit
from tiny import build, config_data
from torch import Tensor

from launch.cli import main
from pretrain.config.load import parse_config
from pretrain.interop.initialise import start_from
from pretrain.interop.official import describe

State = dict[str, Tensor]


def head(seed: int) -> State:
    """Of DINO as its authors name it; sizes of the tests' tiny DINO."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"mlp.0": (32, 64), "mlp.2": (32, 32), "mlp.4": (16, 32)}
    state = {f"{name}.weight": torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0], generator=draw) for name, shape in shapes.items()}
    norms = {"last_layer.weight_g": torch.ones(64, 1), "last_layer.weight_v": torch.randn(64, 16, generator=draw)}
    return {**state, **norms}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def dino() -> Any:
    sides = {
        side: under("module.backbone.", dict(vit().state_dict())) | under("module.head.", head(seed))
        for seed, side in enumerate(("teacher", "student"))
    }
    return {**sides, "epoch": 3, "args": None}


def dinov2() -> Any:
    backbone = dict(vit(init_values=0.1).state_dict()) | {"mask_token": torch.randn(1, 64)}
    state: State = {}
    for side, seed in (("teacher", 0), ("student", 5)):
        state |= under(f"{side}.backbone.", backbone) | under(f"{side}.dino_head.", head(seed))
        state |= under(f"{side}.ibot_head.", head(seed + 1))
    return {"model": state | {"dino_loss.center": torch.zeros(1, 64)}}


def parametrised() -> Any:
    """As newer versions of torch name a weight norm's parts."""
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    state = dinov2()["model"]
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    return {"model": state}


def run(source: Path, shards: Path, tmp_path: Path, **encoder: Any) -> tuple[Any, str]:
    data = config_data("dino", "vit", shards, tmp_path / "runs")
    data["encoder"] = {"family": "vit", "dim": 64, "depth": 2, "heads": 1, "patch": 8, **encoder}
    data["method"] |= {"prototypes": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16}
    if "layer_scale" in encoder:
        data["method"]["ibot"] = {"separate_head": True, "prototypes": 64}
        data["method"]["ibot"] |= {"mask": {"unit": 8}} if "mask" in data["method"] else {}
    method = build(parse_config(data))
    return method, "\n".join(start_from(method, str(source), "dino"))


def test_dino_goes_on_with_the_teachers_head(shards: Path, tmp_path: Path) -> None:
    found = imported(dino(), "dino", tmp_path)
    assert set(found.method) == set(under("head.", head(0)))
    method, lines = run(tmp_path / "out", shards, tmp_path)
    assert f"{len(head(0))} tensors of the method around it" in lines
    for key, value in head(0).items():
        assert torch.equal(method.head.state_dict()[key], value), key
        assert torch.equal(method.teacher["head"].state_dict()[key], value), key


@pytest.mark.parametrize("checkpoint", [dinov2, parametrised])
def test_dinov2_brings_both_heads_and_its_mask_token(
    checkpoint: Callable[[], Any], shards: Path, tmp_path: Path
) -> None:
    found = imported(checkpoint(), "dinov2", tmp_path)
    saved = load_file(tmp_path / "out/heads.safetensors")
    wanted = under("head.", head(0)) | under("patch_head.", head(1))
    assert set(saved) == {*wanted, "encoder.mask_token"}
    for key, value in wanted.items():
        assert torch.equal(saved[key], value), key
    assert "dino_loss.center" in found.left
    method, lines = run(tmp_path / "out", shards, tmp_path, layer_scale=1e-5)
    assert f"{len(saved)} tensors of the method around it" in lines
    for name, seed in (("head", 0), ("patch_head", 1)):
        for key, value in head(seed).items():
            assert torch.equal(getattr(method, name).state_dict()[key], value), key
            assert torch.equal(method.teacher[name].state_dict()[key], value), key


@pytest.mark.parametrize("shared", [True, False])
def test_ibots_second_last_layer_is_a_head_of_patch_tokens(shared: bool, shards: Path, tmp_path: Path) -> None:
    own, other = head(0), head(1)
    second = {key.replace("last_layer", "last_layer2"): value for key, value in (own if shared else other).items()}
    second = {key: value for key, value in second.items() if key.startswith("last_layer2.")}
    backbone = under("backbone.", dict(vit().state_dict()))
    student = {"backbone.masked_embed": torch.randn(1, 64)}
    sides = {"teacher": backbone | under("head.", own | second), "student": backbone | under("head.", other) | student}
    found = imported(sides, "dino", tmp_path)
    wanted = under("head.", own)
    if not shared:
        layers = {key: value for key, value in own.items() if key.startswith("mlp.")}
        last = {key: value for key, value in other.items() if key.startswith("last_layer.")}
        wanted |= under("patch_head.", layers | last)
    assert found.method.keys() == wanted.keys()
    assert all(torch.equal(value, found.method[key]) for key, value in wanted.items())
    assert ("head.last_layer2.weight_g" in found.left) == shared
    (tmp_path / "student").mkdir()
    theirs = imported(sides, "dino", tmp_path / "student", which="student")
    assert torch.equal(theirs.method["encoder.mask_token"][0], student["backbone.masked_embed"])


def test_a_description_names_the_file_of_heads(tmp_path: Path) -> None:
    found = imported(dino(), "dino", tmp_path)
    assert f"{len(head(0))} of its method (in heads.safetensors): head.mlp.0.weight" in describe(found, tmp_path)
    described = json.loads((tmp_path / "out/import.json").read_text())
    assert described["method_keys"] == sorted(under("head.", head(0)))


def test_heads_may_be_asked_for_or_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(mae_state(), tmp_path / "whole.pth")
    torch.save(dict(vit().state_dict()), tmp_path / "encoder.pth")
    command = ["import", str(tmp_path / "whole.pth"), str(tmp_path / "a"), "--as", "mae"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--with", "none"])
    assert not ended.value.code
    assert not (tmp_path / "a/heads.safetensors").exists()
    left = json.loads((tmp_path / "a/import.json").read_text())["left"]
    assert left["decoder_pred.weight"] == "of its method, left out with --with none"
    for given, told in (("heads", "holds no head or decoder"), ("all", "--with is 'all'; it takes heads or none")):
        with pytest.raises(SystemExit) as ended:
            main(["import", str(tmp_path / "encoder.pth"), str(tmp_path / "b"), "--as", "mae", "--with", given])
        assert ended.value.code
        assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b").exists()


def test_a_folder_of_an_earlier_version_brings_its_heads_too(shards: Path, tmp_path: Path) -> None:
    imported(dino(), "dino", tmp_path)
    (tmp_path / "out/heads.safetensors").rename(tmp_path / "out/method.safetensors")
    _, lines = run(tmp_path / "out", shards, tmp_path)
    assert f"{len(head(0))} tensors of the method around it" in lines
