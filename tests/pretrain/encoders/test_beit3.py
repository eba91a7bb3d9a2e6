"""BEiT-3's image encoder: torchscale's names, against timm's form of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from hub_models import everything, images
from torch import Tensor

from pretrain.encoders.vit.beit3 import FIRST_POSITION
from pretrain.interop.export import export_encoder
from pretrain.interop.official import import_checkpoint

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
TO_TORCHSCALE = (
    (r"^patch_embed\.proj\.", "vision_embed.proj."),
    (r"^cls_token$", "vision_embed.cls_token"),
    (r"^norm\.", "encoder.layer_norm.A."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layers.\1.self_attn_layer_norm.A."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layers.\1.final_layer_norm.A."),
    (r"^blocks\.(\d+)\.attn\.norm\.", r"encoder.layers.\1.self_attn.inner_attn_ln.A."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj.A."),
    (r"^blocks\.(\d+)\.mlp\.norm\.", r"encoder.layers.\1.ffn.A.ffn_layernorm."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.ffn.A."),
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = timm.create_model("beit3_base_patch16_224", pretrained=False, fc_norm=False, **SHAPE).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def released(model: torch.nn.Module) -> dict[str, dict[str, Tensor]]:
    """As unilm's files have it: with experts of language beside those of images, and heads."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[f"encoder.layers.{match[1]}.self_attn.{name}_proj.A.{match[2]}"] = part
        elif key == "pos_embed":
            unread = torch.full((FIRST_POSITION, value.shape[-1]), 7.0)
            state["encoder.embed_positions.A.weight"] = torch.cat([unread, value[0]])
        else:
            for theirs, ours in TO_TORCHSCALE:
                key = re.sub(theirs, ours, key)
            state[key] = value
    language = {key.replace(".A.", ".B."): value + 1 for key, value in state.items() if ".A." in key}
    further = {"text_embed.weight": torch.ones(5, 32), "vision_embed.mask_token": torch.full((1, 1, 32), 0.5)}
    return {"model": {f"beit3.{key}": value for key, value in (state | language | further).items()}}


@torch.no_grad()
def test_what_serves_images_is_read_and_all_else_is_named(model: torch.nn.Module, tmp_path: Path) -> None:
    state = released(model)
    torch.save(state, tmp_path / "beit3.pth")
    found = import_checkpoint(tmp_path / "beit3.pth", None, tmp_path / "out", overrides=("heads=2",))
    assert (found.encoder.inner_norm, found.encoder.norm_eps, found.encoder.pool) == (True, 1e-5, "mean")
    pixels = images(32, 32)
    torch.testing.assert_close(everything(tmp_path / "out", pixels), model.forward_features(pixels), rtol=0, atol=1e-5)
    assert all(".B." in key or "text_embed" in key for key in found.left)
    assert torch.equal(found.method["encoder.mask_token"], torch.full((1, 1, 32), 0.5))


@pytest.mark.parametrize("kind", ["timm", "hf", "safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_it_is_exported(kind: str, model: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(released(model), tmp_path / "beit3.pth")
    import_checkpoint(tmp_path / "beit3.pth", "beit3", tmp_path / "in", overrides=("heads=2",))
    suffix = {"hf": "", "onnx": ".onnx"}.get(kind, ".safetensors")
    assert export_encoder(tmp_path / "in", tmp_path / f"out{suffix}", kind).difference <= 1e-4
