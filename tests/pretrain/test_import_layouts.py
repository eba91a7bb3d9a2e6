"""Which layout a checkpoint is in, what is wrapped around its keys, and which side of it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_import import imported, mae_state, old_swin, same_features, swin, vit
from torch import Tensor

from pretrain.encoders.layouts import CheckpointState, recognised
from pretrain.interop.official import describe

State = dict[str, Tensor]


def dino_head() -> State:
    return {"mlp.0.weight": torch.randn(8, 64), "last_layer.weight_g": torch.ones(5, 1)}


def dino_state() -> State:
    backbone = {f"backbone.{key}": value for key, value in vit().state_dict().items()}
    return backbone | {f"head.{key}": value for key, value in dino_head().items()}


def dinov2_state() -> State:
    return dict(vit(init_values=1e-5).state_dict()) | {"mask_token": torch.randn(1, 64)}


def ijepa_state() -> dict[str, State]:
    encoder = dict(vit(class_token=False, global_pool="avg", fc_norm=False).state_dict())
    return {"encoder": encoder, "target_encoder": encoder, "predictor": {"predictor_norm.weight": torch.ones(4)}}


def beit_state() -> State:
    from pretrain.encoders import build_encoder
    from pretrain.encoders.beit.config import BeitConfig

    state = dict(build_encoder(BeitConfig(dim=32, depth=2, heads=2, patch=8), (32, 32)).inner().state_dict())
    return state | {"lm_head.weight": torch.randn(9, 32), "lm_head.bias": torch.randn(9)}


def simmim_state() -> State:
    state = {f"encoder.{key}": value for key, value in old_swin(dict(swin().state_dict())).items()}
    head = {"decoder.0.weight": torch.randn(48, 32, 1, 1), "decoder.0.bias": torch.randn(48)}
    return state | head | {"encoder.mask_token": torch.randn(1, 1, 16)}


CHECKPOINTS: dict[str, Any] = {
    "mae": mae_state,
    "dino": dino_state,
    "dinov2": dinov2_state,
    "ijepa": ijepa_state,
    "beit": beit_state,
    "simmim": simmim_state,
}


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_the_layout_of_released_checkpoints_is_told_by_their_keys(layout: str, tmp_path: Path) -> None:
    found = imported(CHECKPOINTS[layout](), None, tmp_path)
    assert f"read as {layout}, whose names its keys have" in describe(found, tmp_path)


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_another_layout_than_its_own_is_refused_by_the_name_of_its_own(layout: str, tmp_path: Path) -> None:
    for other in {*CHECKPOINTS, "timm"} - {layout}:
        with pytest.raises(ValueError, match=f"this looks like another layout than {other}: --as {layout}$"):
            imported(CHECKPOINTS[layout](), other, tmp_path)
    assert not (tmp_path / "out").exists()


def test_keys_that_several_layouts_share_are_not_guessed_at(tmp_path: Path) -> None:
    state = dict(vit().state_dict())
    assert recognised(CheckpointState(state, "teacher")) == []
    with pytest.raises(ValueError, match="do not tell its layout; name one: --as takes one of beit, simmim"):
        imported(state, None, tmp_path)
    for layout in ("mae", "dino", "dinov2", "timm"):
        (tmp_path / layout).mkdir()
        imported(state, layout, tmp_path / layout)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod._fsdp_wrapped_module.", "module.module."]
)
def test_what_is_wrapped_around_modules_is_taken_off(wrapper: str, tmp_path: Path) -> None:
    state = {f"{wrapper}{key}": value for key, value in vit().state_dict().items()}
    imported({"model": state}, "timm", tmp_path)
    same_features(tmp_path, vit())


def test_blocks_that_were_compiled_or_recomputed_one_by_one(tmp_path: Path) -> None:
    state = {
        key.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module."): value
        for key, value in vit().state_dict().items()
    }
    imported(state, "timm", tmp_path)
    same_features(tmp_path, vit())


def test_a_key_that_is_there_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    state = dict(vit().state_dict())
    state["_orig_mod.cls_token"] = state["cls_token"] + 1
    with pytest.raises(ValueError, match=r"holds cls_token twice, with and without a wrapper's name \(_orig_mod"):
        imported(state, "timm", tmp_path)


@pytest.mark.parametrize("prefix", ["teacher.backbone.", "module.teacher.backbone.", "ema.backbone.", "teacher."])
def test_sides_are_told_by_the_first_word_of_names_too(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in vit().state_dict().items()}
    state |= {f"student.backbone.{key}": value + 1 for key, value in vit().state_dict().items()}
    if prefix.endswith("backbone."):
        state |= {prefix.replace("backbone.", f"head.{key}"): value for key, value in dino_head().items()}
    found = imported(state, "dino", tmp_path)
    same_features(tmp_path, vit())
    assert set(found.method) == ({"head.mlp.0.weight", "head.last_layer.weight_g"} if "backbone" in prefix else set())
    (tmp_path / "student").mkdir()
    theirs = imported(state, "dino", tmp_path / "student", which="student")
    assert torch.equal(theirs.weights["cls_token"], vit().state_dict()["cls_token"] + 1)


@pytest.mark.parametrize("prefix", ["backbone.", "teacher.backbone.", "model.", "student.model.", "visual.trunk."])
def test_a_model_of_timm_within_another(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in vit().state_dict().items()}
    around = {} if "model." in prefix else {prefix.rpartition("backbone.")[0] + "projector.weight": torch.randn(3, 3)}
    which = "student" if "student" in prefix else "teacher"
    found = imported({"state_dict": state | around}, "timm", tmp_path, which=which)
    same_features(tmp_path, vit())
    assert len(found.left) == len(around)


def test_a_file_of_the_other_side_alone_is_refused(tmp_path: Path) -> None:
    state = {f"student.backbone.{key}": value for key, value in vit().state_dict().items()}
    with pytest.raises(ValueError, match="holds the student alone; import it with --which student"):
        imported(state, "dino", tmp_path)
