"""Checkpoints of frameworks that train encoders of others: solo-learn's, lightly's, torchvision's."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from test_import import imported, same_features, vit
from torch import Tensor, nn

from pretrain.encoders.saved import load_encoder
from pretrain.interop.official import describe, import_checkpoint

State = dict[str, Tensor]


def with_prefix(prefix: str, state: State, shift: float = 0.0) -> State:
    return {f"{prefix}{key}": value + shift for key, value in state.items()}


def plain() -> State:
    return dict(vit().state_dict())


def projector(prefix: str) -> State:
    return {f"{prefix}0.weight": torch.randn(8, 64), f"{prefix}0.bias": torch.randn(8)}


def test_solo_learn_without_a_momentum_encoder(tmp_path: Path) -> None:
    state = with_prefix("backbone.", plain()) | projector("projector.") | {"classifier.weight": torch.randn(3, 64)}
    found = imported({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.1.2"}, "solo", tmp_path)
    same_features(tmp_path, vit())
    assert "it has no teacher beside the student: backbone is taken" in found.notes
    assert found.method_name == "solo-learn"
    left = {"projector.0.weight", "projector.0.bias", "classifier.weight", "[epoch]", "[pytorch-lightning_version]"}
    assert set(found.left) == left


def test_solo_learns_momentum_encoder_is_the_teacher(tmp_path: Path) -> None:
    state = with_prefix("momentum_backbone.", plain()) | with_prefix("backbone.", plain(), 1.0)
    state |= {"momentum_head.mlp.0.weight": torch.randn(8, 64), "momentum_head.last_layer.weight_g": torch.ones(5, 1)}
    state |= {"head.mlp.0.weight": torch.randn(8, 64), "head.last_layer.weight_g": torch.ones(5, 1)}
    found = imported({"state_dict": state}, "solo", tmp_path)
    same_features(tmp_path, vit())
    assert torch.equal(found.method["head.mlp.0.weight"], state["momentum_head.mlp.0.weight"])
    assert (found.method_name, set(found.method)) == ("dino", {"head.mlp.0.weight", "head.last_layer.weight_g"})
    (tmp_path / "student").mkdir()
    theirs = imported({"state_dict": state}, "solo", tmp_path / "student", which="student")
    assert torch.equal(theirs.weights["cls_token"], plain()["cls_token"] + 1)
    assert torch.equal(theirs.method["head.mlp.0.weight"], state["head.mlp.0.weight"])


@pytest.mark.parametrize(
    ("name", "family", "shape"),
    [
        ("convnext_tiny", "convnext", {"dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1)}),
        ("swin_tiny_patch4_window7_224", "swin", {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}),
    ],
)
def test_solo_learns_other_backbones(name: str, family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=0, **shape)
    found = imported({"state_dict": with_prefix("backbone.", dict(model.state_dict()))}, "solo", tmp_path)
    assert found.encoder.family == family


def mae_decoder(width: int, dim: int = 16) -> State:
    decoder = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=dim, depth=1, num_heads=1, num_classes=0
    )
    blocks = {
        f"decoder_{key}": value for key, value in decoder.state_dict().items() if key.startswith(("blocks", "norm"))
    }
    linear = {"decoder_embed.weight": torch.randn(dim, width), "decoder_embed.bias": torch.randn(dim)}
    linear |= {"decoder_pred.weight": torch.randn(192, dim), "decoder_pred.bias": torch.randn(192)}
    return {**blocks, **linear, "mask_token": torch.randn(1, 1, dim), "decoder_pos_embed": torch.randn(1, 17, dim)}


@pytest.mark.parametrize(("layout", "prefix"), [("solo", "backbone."), ("lightly", "backbone.vit.")])
def test_their_maes_bring_the_decoder_along(layout: str, prefix: str, tmp_path: Path) -> None:
    model = vit(embed_dim=192, num_heads=12 if layout == "solo" else 3)
    decoder = mae_decoder(192)
    state = with_prefix(prefix, dict(model.state_dict())) | with_prefix("decoder.", decoder)
    found = imported({"state_dict": state | {"classifier.bias": torch.zeros(3)}}, layout, tmp_path)
    same_features(tmp_path, model)
    assert found.method_name == "mae"
    assert set(found.method) == set(decoder) - {"decoder_pos_embed"}
    if layout == "solo":
        assert "heads=12, as solo-learn's MAE has" in describe(found, tmp_path)


@pytest.mark.parametrize(
    ("prefix", "other"),
    [
        ("teacher_embedding_model.wrapped_model._model.", "student_embedding_model.wrapped_model._model."),
        ("embedding_model.wrapped_model._model.", None),
        ("wrapped_model._model.", None),
        ("teacher_backbone.", "student_backbone."),
        ("teacher_backbone.vit.", "student_backbone.vit."),
        ("backbone_momentum.", "backbone."),
        ("backbone.", None),
        ("", None),
    ],
)
def test_lightlys_checkpoints_and_exports(prefix: str, other: str | None, tmp_path: Path) -> None:
    state = with_prefix(prefix, plain()) | projector("projection_head.layers.")
    if other:
        state |= with_prefix(other, plain(), 1.0)
    if not prefix:
        state = plain()
    found = imported({"state_dict": state} if prefix else state, "lightly", tmp_path)
    same_features(tmp_path, vit())
    assert len(found.left) == len(state) - len(plain())
    if other:
        (tmp_path / "student").mkdir()
        theirs = imported({"state_dict": state}, "lightly", tmp_path / "student", which="student")
        assert torch.equal(theirs.weights["cls_token"], plain()["cls_token"] + 1)


def test_lightlys_heads_are_dinos(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {
        "layers.0.weight": torch.randn(8, 64),
        "layers.2.weight": torch.randn(8, 8),
        "layers.0.bias": torch.randn(8),
    }
    head = {**weights, "last_layer.weight_v": torch.randn(5, 8), "last_layer.weight_g": torch.ones(5, 1)}
    state = with_prefix("teacher_embedding_model.wrapped_model._model.", plain())
    state |= with_prefix("student_embedding_model.wrapped_model._model.", plain(), 1.0)
    for side in ("teacher", "student"):
        state |= with_prefix(f"{side}_head.dino_head.", head) | with_prefix(f"{side}_head.ibot_head.", head, 1.0)
    found = imported({"state_dict": state}, "lightly", tmp_path)
    names = {name.replace("layers", "mlp") for name in head}
    assert set(found.method) == {f"{which}.{name}" for which in ("head", "patch_head") for name in names}
    assert torch.equal(found.method["patch_head.mlp.2.weight"], weights["layers.2.weight"] + 1)


def test_lightlys_exports_of_dinov2(tmp_path: Path) -> None:
    model = vit(init_values=0.1)
    state = dict(model.state_dict()) | {"mask_token": torch.zeros(1, 64)}
    found = imported(state, "lightly", tmp_path)
    same_features(tmp_path, model)
    assert found.mask_token is not None


def test_a_checkpoint_with_lightly_trains_own_objects_names_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrapper:
        pass

    module = types.ModuleType("lightly_train")
    Wrapper.__module__, Wrapper.__qualname__, module.Wrapper = "lightly_train", "Wrapper", Wrapper  # type: ignore
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lightly_train", module)
        torch.save({"state_dict": plain(), "lightly_train": Wrapper()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"Export it with lightly_train\.export"):
        import_checkpoint(tmp_path / "last.ckpt", "lightly", tmp_path / "out")


def test_what_is_no_frameworks_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no key begins with momentum_backbone\..* as in solo-learn"):
        imported(plain(), "solo", tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["torchvision", "lightly", None])
def test_torchvision(layout: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32}
    model = torchvision.models.VisionTransformer(**shape, mlp_dim=48, num_classes=3).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    found = imported(dict(model.state_dict()), layout, tmp_path, "heads=2")
    assert {"heads.head.weight", "heads.head.bias"} == set(found.left)
    model.heads = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    encoder, _ = load_encoder(tmp_path / "out")
    torch.testing.assert_close(encoder(images).pooled, model(images), rtol=0, atol=1e-5)
