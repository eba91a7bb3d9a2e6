"""CLIP's image encoders against values recorded from OpenAI's and OpenCLIP's code: features of images, and gradients of
the contrastive loss with the recorded features of texts; see test_encoders.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity_files import imported, recorded, relative_error
from torch.nn import functional as F

CASES = {"clip_openai": ("clip",), "clip_openai2": ("clip",), "openclip_vit": ("openclip", "heads=2")}


@pytest.mark.parametrize("name", CASES)
def test_features_and_gradients_are_the_authors(name: str, tmp_path: Path) -> None:
    record = recorded(f"{name}.pt")
    layout, *overrides = CASES[name]
    encoder, found = imported(record["state_dict"], layout, tmp_path / "weights", *overrides)
    projection = found.method["projection"].requires_grad_()
    images = encoder(record["inputs"]["image"]).pooled @ projection
    told = record["outputs"]["image_features"]
    normed = torch.allclose(told.norm(dim=-1), torch.ones(len(told)), atol=1e-4)  # OpenCLIP's are
    torch.testing.assert_close(F.normalize(images, dim=-1) if normed else images, told, atol=1e-4, rtol=0)

    scale = record["state_dict"]["logit_scale"].exp()
    texts = F.normalize(record["outputs"]["text_features"], dim=-1)
    logits = scale * F.normalize(images, dim=-1) @ texts.T
    right = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    assert loss.item() == pytest.approx(float(record["loss"]), rel=1e-5)
    loss.backward()
    state = record["state_dict"] | {key: value for key, value in record["grads"].items() if key.startswith("visual.")}
    slopes, of_projection = imported(state, layout, tmp_path / "gradients", *overrides)
    assert relative_error(projection.grad, of_projection.method["projection"]) < 1e-3
    expected = dict(slopes.inner().named_parameters())
    for key, parameter in encoder.inner().named_parameters():
        if expected[key].norm() > 1e-7:
            assert relative_error(parameter.grad, expected[key]) < 1e-3, key
