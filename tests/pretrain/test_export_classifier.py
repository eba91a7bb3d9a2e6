"""Fine-tuned classifiers opened by timm and by ONNX's runtime."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import IN_TIMM, PVT, VIT, card_of

from pretrain.encoders import build_encoder
from pretrain.interop.classifier import OfPixels, export_classifier
from pretrain.methods.finetune.network import Head
from pretrain.methods.finetune.saved import HeadCard, load_classifier, save_classifier

CLASSES = ("ant", "bee", "cow")
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (config, {}) for name, config in IN_TIMM.items()},
    "class": (VIT, {"pool": "class"}),
    "mean": (VIT, {"pool": "mean"}),
    "norm after": (VIT, {"pool": "mean", "fc_norm": True}),
    "beit, norm after": (IN_TIMM["beit"], {"pool": "mean", "fc_norm": True}),
    "numbers": (VIT, {"task": "numbers", "target_mean": (3.0, -1.0, 9.0), "target_std": (2.0, 0.1, 1.0)}),
}


def saved(folder: Path, config: Any, about: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    card = dataclasses.replace(card_of(config), method="finetune")
    encoder = build_encoder(config, card.image_size)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    head_card = HeadCard(**{"task": "one_label", "classes": CLASSES, "pool": None, "fc_norm": False} | about)
    head = Head(encoder.dim, len(CLASSES), head_card.pool, head_card.fc_norm, init_std=0.5)
    torch.nn.init.normal_(head.fc.bias)
    save_classifier(folder, encoder.state_dict(), head.state_dict(), card, head_card)
    return folder


@pytest.mark.parametrize("name", HEADS)
def test_timm_loads_it_strictly_and_says_the_same(name: str, tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "encoder", *HEADS[name]), tmp_path / "out.safetensors"
    done = export_classifier(folder, out, "timm")
    with safe_open(out, "pt") as file:
        header = file.metadata()
    model = timm.create_model(**json.loads(header["timm"])).eval()
    model.load_state_dict(load_file(out), strict=True)
    images = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    with torch.no_grad():
        wanted = OfPixels(load_classifier(folder))(images)[0]
        torch.testing.assert_close(model((images - mean) / std), wanted, atol=2e-5, rtol=1e-5)
    assert done.difference <= 1e-5
    assert ("in the units of the labels: ant" if name == "numbers" else "shares by softmax: ant") in done.usage
    assert json.loads(header["selfsight_head"])["classes"] == list(CLASSES)
    space: dict[str, Any] = {"images": images}
    exec(done.usage, space)
    assert space["outputs"].shape == (4, 3)


def test_a_graph_says_the_same(tmp_path: Path) -> None:
    config, about = PVT, HEADS["numbers"][1]
    out = tmp_path / "out.onnx"
    done = export_classifier(saved(tmp_path / "encoder", config, about), out, "onnx")
    assert done.difference <= 1e-4
    space: dict[str, Any] = {"images": torch.rand(2, 3, 32, 32).numpy()}
    exec(done.usage, space)
    assert space["outputs"].shape == (2, 3)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "encoder", PVT, {})
    with pytest.raises(ValueError, match=r"no model that takes these weights.*onnx"):
        export_classifier(folder, tmp_path / "out.safetensors", "timm")
    with pytest.raises(ValueError, match="--no-head"):
        export_classifier(folder, tmp_path / "hub", "hf")
    (folder / "head.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be read"):
        export_classifier(folder, tmp_path / "out.onnx", "onnx")
    (folder / "head.safetensors").unlink()
    with pytest.raises(ValueError, match="no head"):
        export_classifier(folder, tmp_path / "out.onnx", "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"encoder"}
