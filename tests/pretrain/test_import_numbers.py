"""What an imported checkpoint's numbers may be, and what is said of those settings that its weights do not tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_import import imported, mae_state, old_swin, swin, vit
from torch import Tensor

from pretrain.encoders import build_encoder
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.patches import sincos_positions
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig
from pretrain.interop.official import describe

State = dict[str, Tensor]


def inner(config: Any, side: int) -> State:
    torch.manual_seed(0)
    return dict(build_encoder(config, (side, side)).inner().state_dict())


def wrapped(layout: str) -> State:
    """The tensors of a small checkpoint in each layout."""
    if layout in ("mae", "dino", "dinov2", "timm"):
        return mae_state() if layout == "mae" else dict(vit().state_dict())
    if layout == "beit":
        return inner(BeitConfig(dim=32, depth=2, heads=2, patch=8), 32)
    if layout == "simmim":
        return {f"encoder.{key}": value for key, value in old_swin(dict(swin().state_dict())).items()}
    if layout == "pvt":
        return inner(PvtConfig(dims=(64, 128), depths=(1, 1), heads=(1, 2), mlp_ratios=(2, 2), sr=(2, 1), patch=8), 64)
    return inner(UmMaeSwinConfig(dim=8, depths=(1, 2), heads=(1, 2), patch=4, window=8), 64)


LAYOUTS = ("mae", "dino", "dinov2", "beit", "simmim", "um_mae", "pvt", "timm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_another_precision_are_brought_to_float32(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {
        key: value.to(dtype) if value.is_floating_point() else value.contiguous()
        for key, value in wrapped(layout).items()
    }
    found = imported({"model": state}, layout, tmp_path)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    stored = {key.removeprefix("encoder."): value for key, value in state.items()}
    same = [key for key in saved if key in stored]
    assert len(same) > 10
    for key in same:
        assert torch.equal(saved[key], stored[key].float()), key
    assert f"weights in {str(dtype).removeprefix('torch.')} were brought to float32" in describe(found, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_fixed_positions_are_known_in_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    for folder in ("fixed", "learned"):
        (tmp_path / folder).mkdir()
    state = mae_state()
    fixed = sincos_positions(state["pos_embed"].shape[2], (4, 4))
    state["pos_embed"] = torch.cat([torch.zeros_like(fixed[:1]), fixed])[None]
    state = {key: value.to(dtype) for key, value in state.items()}
    assert imported({"model": state}, "mae", tmp_path / "fixed").encoder.positions == "sincos"
    state["pos_embed"] = state["pos_embed"] + 0.1
    assert imported({"model": state}, "mae", tmp_path / "learned").encoder.positions == "learned"


def test_one_half_tensor_among_others_is_brought_along(tmp_path: Path) -> None:
    state = dict(vit().state_dict())
    state["norm.weight"] = state["norm.weight"].half()
    assert "weights in float16 were brought to float32" in imported(state, "timm", tmp_path).notes


def test_weights_in_float32_are_taken_without_a_word(tmp_path: Path) -> None:
    assert not [line for line in imported(dict(vit().state_dict()), "timm", tmp_path).notes if "float" in line]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_not_finite_are_refused_by_key(layout: str, value: float, tmp_path: Path) -> None:
    state = wrapped(layout)
    key = next(key for key in state if key.endswith(("norm1.weight", "norm1.bias")))
    state[key] = state[key].clone()
    state[key][0] = value
    named = key.removeprefix("encoder.").replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"NaN, infinite, .*{named} \(1 of {state[key].numel()}\)"):
        imported({"model": state}, layout, tmp_path)
    assert not (tmp_path / "out").exists()


def test_weights_of_the_method_and_those_too_large_for_float32_are_refused_too(tmp_path: Path) -> None:
    state = mae_state()
    state["decoder_embed.bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"decoder_embed.bias \(1 of 16\)"):
        imported({"model": state}, "mae", tmp_path)
    double = {key: value.double() for key, value in vit().state_dict().items()}
    double["norm.bias"][0] = 1e300
    with pytest.raises(ValueError, match=r"too large for float32: norm.bias \(1 of 64\)"):
        imported(double, "timm", tmp_path)


def test_what_is_left_out_may_hold_anything(tmp_path: Path) -> None:
    state = dict(vit().state_dict()) | {"head.weight": torch.full((10, 64), float("nan"))}
    assert imported(state, "timm", tmp_path).left["head.weight"] == "a classifier's"


def test_guesses_are_said_and_what_the_user_tells_is_none(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    state = dict(vit(num_heads=4).state_dict())  # 64 wide: one head, had the width its say
    found = imported(state, "dino", tmp_path / "a")
    assert "heads=1 is guessed (from the width 64); give heads=N if wrong" in describe(found, tmp_path)
    assert found.notes == json.loads((tmp_path / "a/out/import.json").read_text(encoding="utf-8"))["notes"]
    assert not [line for line in imported(state, "dino", tmp_path / "b", "heads=4").notes if "heads" in line]
    pyramid = imported(wrapped("pvt"), "pvt", tmp_path / "c")
    assert "heads=[1,2] is guessed (from the widths); give heads=N if wrong" in pyramid.notes


def test_a_map_that_is_no_square_is_told_and_not_guessed(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    model = vit(size=(16, 64))  # type: ignore[arg-type]  # 2 rows of 8, as many as 4 of 4
    square = imported(dict(model.state_dict()), "timm", tmp_path / "a")
    assert square.image_size == (32, 32)
    assert "pos_embed's 16 positions are guessed to be 4 rows of 4; give grid=HxW if wrong" in square.notes
    wide = imported(dict(model.state_dict()), "timm", tmp_path / "b", "grid=2x8")
    assert wide.image_size == (16, 64)
    assert not [line for line in wide.notes if "grid" in line]
    from pretrain.encoders.saved import load_encoder

    encoder, card = load_encoder(tmp_path / "b" / "out")
    images = torch.randn(2, 3, *card.image_size)
    with torch.no_grad():
        theirs = model.forward_features(images)
        features = encoder(images)
    assert features.prefix_tokens is not None
    torch.testing.assert_close(torch.cat([features.prefix_tokens, features.tokens], dim=1), theirs, rtol=0, atol=1e-5)
    for grid, message in (("grid=3x8", "pos_embed has 16 positions"), ("grid=16", "no grid"), ("grid=0x4", "no grid")):
        with pytest.raises(ValueError, match=message):
            imported(dict(model.state_dict()), "timm", tmp_path / "c", grid)


def test_a_grid_that_nothing_asks_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no positions whose grid is to be told"):
        imported(wrapped("simmim"), "simmim", tmp_path, "grid=2x8")


def test_sizes_that_windows_do_not_tell_are_said_to_be_guessed(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    found = imported(wrapped("um_mae"), "um_mae", tmp_path / "a")
    assert "window=8 is guessed (as published); give window=N if wrong" in found.notes
    told = imported(wrapped("simmim"), "simmim", tmp_path / "b", image_size=32)
    assert not [line for line in told.notes if "px" in line]
