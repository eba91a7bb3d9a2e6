"""ConvNeXt: timm's numbers, DINOv3's class feature, official layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.convnext.config import ConvnextConfig
from pretrain.encoders.convnext.encoder import ConvnextEncoder
from pretrain.encoders.layouts import CheckpointState
from pretrain.encoders.read_layout import read_layout
from pretrain.encoders.saved import EncoderCard, save_encoder, timm_recipe
from pretrain.interop.export import export_encoder

SMALL: dict[str, Any] = {"dims": (8, 16, 16, 32), "depths": (1, 1, 2, 1)}


def make(**settings: Any) -> ConvnextEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(ConvnextConfig(**SMALL, **settings), (64, 64), mask_token=True).eval()
    assert isinstance(encoder, ConvnextEncoder)
    for parameter in encoder.parameters():  # layer scale starts where nothing would show
        parameter.data += 0.2 * torch.randn_like(parameter)
    return encoder


def images(size: tuple[int, int] = (64, 96), seed: int = 1) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("patch", "size"), [(4, (64, 96)), (1, (16, 24))])
def test_values_and_gradients_are_timms(patch: int, size: tuple[int, int]) -> None:
    encoder = make(patch=patch)
    model = ConvNeXt(num_classes=0, patch_size=patch, **SMALL).eval()
    model.load_state_dict(encoder.inner().state_dict())
    features = encoder(images(size))
    pooled = model(images(size))
    assert features.grid == (2, 3)
    torch.testing.assert_close(features.pooled, pooled, rtol=0, atol=1e-5)
    for outcome in (features.pooled, pooled):
        outcome.square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in encoder.inner().named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)


def test_class_feature_and_tokens_go_through_one_norm() -> None:
    encoder = make()
    features = encoder(images(), layers=(-1,))
    cells = encoder.run(encoder.embed(images()), None, set())[0].flatten(1, 2)
    together = encoder.final_norm(torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1))
    torch.testing.assert_close(features.pooled, together[:, 0])
    torch.testing.assert_close(features.tokens, together[:, 1:])
    torch.testing.assert_close(features.layers[0].pooled, features.pooled)


def test_timm_computes_the_same_of_the_exported_file(tmp_path: Path) -> None:
    encoder = make()
    card = EncoderCard(ConvnextConfig(**SMALL), (64, 64), 3, (0.5,) * 3, (0.2,) * 3, "dino", None, 1, 1.0, "photos")
    save_encoder(tmp_path / "encoder", encoder.state_dict(), card)
    done = export_encoder(tmp_path / "encoder", tmp_path / "out.safetensors", "timm")
    assert done.difference <= 1e-5
    model = timm.create_model(**timm_recipe(card), checkpoint_path=str(tmp_path / "out.safetensors")).eval()
    torch.testing.assert_close(model(images()), encoder(images()).pooled, rtol=0, atol=1e-5)


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for key, value in state.items():
        key = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", key).replace("stem", "downsample_layers.0")
        key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        named[key.replace("head.norm", "norm")] = value
    return named | {f"norms.3.{kind}": named[f"norm.{kind}"] for kind in ("weight", "bias")}


def hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for key, value in state.items():
        key = key.replace("stem", "stages.0.downsample").replace(".norm", ".layer_norm").replace("head.", "")
        key = key.replace(".downsample.", ".downsample_layers.").replace(".blocks.", ".layers.")
        key = key.replace("conv_dw", "depthwise_conv").replace("mlp.fc", "pointwise_conv")
        named[f"model.{key}" if key.startswith("stages") else key] = value
    return named


@pytest.mark.parametrize(
    ("layout", "names", "left"),
    [("dinov3", official, 2), ("convnext", official, 2), ("dinov3", hub, 0), ("timm", dict, 0)],
)
def test_official_layouts_are_read_with_every_key_accounted_for(layout: str, names: Any, left: int) -> None:
    state = make().inner().state_dict()
    found = read_layout(layout, CheckpointState(names(state), "teacher", (), 64))
    assert (found.encoder.family, found.encoder.shape) == ("convnext", (SMALL["dims"], SMALL["depths"]))
    assert len(found.left) == left
    assert found.weights.keys() == state.keys()
    assert all(torch.equal(value, found.weights[key]) for key, value in state.items())


def test_two_norms_where_there_should_be_one_are_refused() -> None:
    state = official(make().inner().state_dict())
    state["norms.3.bias"] = state["norms.3.bias"] + 1
    with pytest.raises(ValueError, match=r"norms\.3\.bias differs from norm\.bias"):
        read_layout("dinov3", CheckpointState(state, "teacher"))


def test_visible_units_moved_together_are_an_image_of_half_the_side() -> None:
    """With the same corner visible everywhere, the encoder sees what a picture of those units alone would show."""
    encoder = make()
    drop = torch.ones(2, 4, 4, dtype=torch.bool)
    drop[:, ::2, 1::2] = False
    pixels = images((64, 64))
    few = encoder(pixels, Mask(drop=drop))
    cells = pixels.unfold(2, 16, 16).unfold(3, 16, 16)[:, :, ::2, 1::2]  # b c 2 2 16 16
    alone = cells.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    torch.testing.assert_close(few.tokens, encoder(alone).tokens)
    assert few.ids_keep is not None
