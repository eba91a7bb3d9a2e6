"""Saved encoders load in timm by the recipe that lies beside them, and give the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pretrain.encoders import build_encoder
from pretrain.encoders.pvt_v2.config import PvtV2Config
from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.twins.config import TwinsConfig
from pretrain.encoders.vit.config import VitConfig

STAGES: dict[str, Any] = {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 2), "heads": (1, 2, 2, 4)}
CONFIGS = {
    "vit": VitConfig(dim=32, depth=2, heads=2, patch=8, registers=2),
    "vit mean": VitConfig(dim=32, depth=2, heads=2, patch=8, pool="mean", layer_scale=0.1),
    "deit": VitConfig(dim=32, depth=2, heads=2, patch=8, distillation_token=True),
    "swin": SwinConfig(dim=8, depths=(2, 2), heads=(1, 2), patch=4, window=4),
    "swin v2": SwinConfig(version=2, dim=8, depths=(2, 2), heads=(1, 2), patch=4, window=4),
    "pvt_v2": PvtV2Config(size="b0", **STAGES),
    "pvt_v2 b5 linear": PvtV2Config(size="b5", linear=True, **STAGES),
    "twins": TwinsConfig(window=5, **STAGES),
    "timm vit": TimmConfig(model="vit_tiny_patch16_224", args={"depth": 2}, drop_path=0.1),
    "timm resnet": TimmConfig(model="resnet18", args={"layers": [1, 1, 1, 1]}),
    "timm coatnet": TimmConfig(model="coatnet_0_rw_224", args={"embed_dim": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}),
    "timm mixer": TimmConfig(model="mixer_s32_224", args={"mlp_ratio": [0.1, 0.1]}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("size", "channels"), [((64, 64), 3), ((64, 96), 1)])
def test_timm_loads_what_we_save(name: str, size: tuple[int, int], channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(CONFIGS[name], size, channels, mask_token=name != "timm resnet")
    images = torch.randn(2, channels, *size)
    encoder.train()(images)  # running statistics are weights too
    encoder.eval()
    card = EncoderCard(
        CONFIGS[name], size, channels, (0.5,) * channels, (0.2,) * channels, "dino", None, 8, 1.0, "a run"
    )
    folder = tmp_path / "encoder"
    save_encoder(folder, encoder.state_dict(), card)
    with torch.no_grad():
        expected = encoder(images).pooled
        recipe = json.loads((folder / "config.json").read_text())["timm"]
        model = timm.create_model(**recipe).eval()
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-6)
        again, read = load_encoder(folder)
        assert read == card
        torch.testing.assert_close(again(images).pooled, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.5]}, "each channel needs a mean"),
        ({"std": [0.2, 0.0, 0.2]}, "a std above 0"),
        ({"image_size": [-32, 32]}, "images of 3 x"),
        ({"encoder": {"family": "vit", "dim": 32, "depth": 3, "heads": 2, "patch": 8}}, "not of the encoder"),
        ({"encoder": {"family": "timm", "model": "hf-hub:someone/model"}}, "has no model"),
    ],
)
def test_a_description_that_does_not_fit_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = VitConfig(dim=32, depth=2, heads=2, patch=8)
    card = EncoderCard(config, (32, 32), 3, (0.5,) * 3, (0.2,) * 3, "dino", None, 8, 1.0, "a run")
    save_encoder(tmp_path / "encoder", build_encoder(config, (32, 32)).state_dict(), card)
    place = tmp_path / "encoder" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path / "encoder")


def test_a_header_that_is_no_json_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"selfsight": "{"})
    with pytest.raises(ValueError, match="can't be read") as raised:
        load_encoder(tmp_path / "x.safetensors")
    assert raised.traceback[-1].frame.f_globals["__name__"] == "pretrain.encoders.saved"
