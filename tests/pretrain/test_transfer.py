"""Weights of one encoder in another of its family: channels, prefix tokens, timm's tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pretrain.config import EncoderConfig
from pretrain.encoders import build_encoder
from pretrain.encoders.base import Encoder
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.transfer import Fitted, fit
from pretrain.encoders.twins.config import TwinsConfig
from pretrain.encoders.vit.config import VitConfig

VIT = VitConfig(dim=32, depth=2, heads=2, patch=8)
STAGES: dict[str, Any] = {"dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}
PVT = PvtConfig(dims=(16, 32), depths=(1, 1), heads=(1, 2), mlp_ratios=(2, 2), sr=(2, 1), patch=4)


def fitted(source: EncoderConfig, target: EncoderConfig, **settings: Any) -> tuple[Encoder, Encoder, Fitted]:
    size = settings.get("size", (64, 64))
    torch.manual_seed(0)
    old = build_encoder(source, size, settings.get("channels", 3)).eval()
    new = build_encoder(target, settings.get("new_size", size), settings.get("new_channels", 3)).eval()
    for parameter in old.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = fit(old.inner().state_dict(), new)
    new.inner().load_state_dict(found.weights)
    return old, new, found


@pytest.mark.parametrize(
    "config", [VIT, dataclasses.replace(VIT, stem="conv"), PVT, TwinsConfig(**STAGES, window=2)], ids=str
)
@pytest.mark.parametrize(("channels", "new_channels"), [(3, 1), (1, 3)])
@torch.no_grad()
def test_a_grey_image_is_embedded_as_before(config: EncoderConfig, channels: int, new_channels: int) -> None:
    old, new, found = fitted(config, config, channels=channels, new_channels=new_channels)
    assert not found.left
    grey = torch.randn(2, 1, 64, 64)
    given = [
        encoder(grey.expand(-1, count, -1, -1)).pooled for encoder, count in ((old, channels), (new, new_channels))
    ]
    torch.testing.assert_close(given[1], given[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_positions_of_prefix_tokens_go_by_their_names() -> None:
    source = dataclasses.replace(VIT, distillation_token=True)
    old, new, found = fitted(source, dataclasses.replace(VIT, registers=2), new_size=(96, 64))
    assert set(found.left) == {"dist_token"}
    positions = new.inner().pos_embed
    assert torch.equal(positions[:, 0], old.inner().pos_embed[:, 0])
    assert not positions[:, 1:3].any()  # registers have none, nor the distillation token's
    assert positions.shape == (1, 3 + 12 * 8, 32)


@torch.no_grad()
def test_tables_without_rows_for_prefix_tokens() -> None:
    theirs = TimmConfig(model="deit3_small_patch16_224", args={"depth": 1})
    own = VitConfig(size="small", depth=1, patch=16, layer_scale=1e-5)
    old, new, found = fitted(theirs, own)
    assert not found.left
    assert not found.fresh
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(new(images).pooled, old(images).pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224"])
def test_a_timm_model_of_another_size(model: str) -> None:
    config = TimmConfig(model=model, args={"depth": 1})
    _, _, found = fitted(config, config, new_size=(96, 96))
    assert not found.left
    assert found.resized
