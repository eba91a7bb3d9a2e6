"""CLIP's losses and towers against recorded values; see test_parity.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parity_files import recorded, relative_error
from torch import Tensor

from pretrain.methods.clip import losses
from pretrain.text.settings import TextConfig
from pretrain.text.tower import TextTower


def whole_of(images: Tensor, texts: Tensor, scale: Tensor) -> losses.Whole:
    images, texts = images.detach(), texts.detach()
    sums = losses.log_sums(images, texts, scale), losses.log_sums(texts, images, scale)
    return losses.Whole(images, texts, *sums)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", ["clip_whole_batch", "siglip_whole_batch"])
def test_losses(case: str, parts: int) -> None:
    record = recorded("clip_losses.pt")
    given = {name: value.clone().requires_grad_(True) for name, value in record["inputs"][case].items()}
    images, texts, scale = given["image"], given["text"], given["logit_scale"]
    whole, size = whole_of(images, texts, scale), len(images) // parts
    found = []
    for first in range(0, len(images), size):
        own = images[first : first + size], texts[first : first + size], first, whole, scale
        found.append((losses.siglip(*own, given["logit_bias"]) if "siglip" in case else losses.infonce(*own)).loss)
    loss = torch.stack(found).mean()
    torch.testing.assert_close(loss, record["loss"][case], rtol=1e-5, atol=0)
    loss.backward()
    for name, gradient in record["grads"][case].items():
        assert relative_error(given[name].grad, gradient) < 1e-3, name


TEXT = ("token_embedding", "positional_embedding", "transformer.", "ln_final", "text_projection")


@pytest.mark.parametrize("name", ["clip_openai", "clip_openai2", "openclip_vit"])
def test_the_text_tower(name: str) -> None:
    record = recorded(f"{name}.pt")
    config, state = record["config"], record["state_dict"]
    text = config.get("text") or {
        "context_length": config["context_length"], "vocab_size": config["vocab_size"],
        "width": config["transformer_width"], "heads": config["transformer_heads"],
        "layers": config["transformer_layers"],
    }  # fmt: skip
    quick = "quick_gelu" if name.startswith("clip_openai") else "gelu"
    settings = TextConfig(
        dim=text["width"], depth=text["layers"], heads=text["heads"], context=text["context_length"], activation=quick
    )
    tower = TextTower(settings, text["vocab_size"], config["embed_dim"])
    tower.load_state_dict({key: value for key, value in state.items() if key.startswith(TEXT)})
    features = tower(record["inputs"]["text"])
    outputs = record["outputs"]
    normed = name == "openclip_vit"
    ours = F.normalize(features, dim=1) if normed else features
    torch.testing.assert_close(ours, outputs["text_features"], atol=1e-4, rtol=0)
    images = outputs["image_features"] if normed else F.normalize(outputs["image_features"], dim=1)
    texts, scale = F.normalize(features, dim=1), state["logit_scale"].exp()
    loss = losses.infonce(images, texts, 0, whole_of(images, texts, scale), scale).loss
    torch.testing.assert_close(loss, record["loss"], rtol=1e-5, atol=0)
    loss.backward()
    for key, parameter in tower.named_parameters():
        assert relative_error(parameter.grad, record["grads"][key]) < 1e-3, key
