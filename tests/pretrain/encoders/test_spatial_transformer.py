"""Spatial transformers: sampled as written out in loops, and in front of encoders of any family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import CUDA, trace_on_fake_gpu
from test_supported import config_of
from tiny import build, random_batch
from torch import Tensor, nn

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Encoder, Mask, depth_of
from pretrain.encoders.registry import FAMILIES
from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder, timm_recipe
from pretrain.encoders.shapes import SpatialTransformerConfig
from pretrain.encoders.spatial_transformer import SpatialTransformer
from pretrain.encoders.transfer import fit
from pretrain.engines.optim import parameter_groups

VIT: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "patch": 8}


def images(size: tuple[int, int] = (16, 24), count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def moved(transformer: SpatialTransformer) -> SpatialTransformer:
    """Away from the identity."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        transformer.offset.weight.add_(torch.randn(transformer.offset.weight.shape, generator=generator) * 0.5)
    return transformer


def vit(transforms: bool = True, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    section = SpatialTransformerConfig() if transforms else None
    config = FAMILIES["vit"].config(**VIT, **settings, spatial_transformer=section)
    return build_encoder(config, (16, 24), mask_token=True).eval()


def slow_sample(cells: Tensor, theta: Tensor) -> Tensor:
    """Equations 1, 3 and 5 of the paper, place by place, with coordinates of -1 and 1 at the image's edges."""
    batch, _, height, width = cells.shape
    out = torch.zeros_like(cells)
    for image in range(batch):
        for row in range(height):
            for column in range(width):
                target = torch.tensor([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1, 1.0])
                x, y = theta[image] @ target
                x, y = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
                for m in range(height):
                    for n in range(width):
                        near = (1 - (x - n).abs()).clamp(min=0) * (1 - (y - m).abs()).clamp(min=0)
                        out[image, :, row, column] += near * cells[image, :, m, n]
    return out


def test_sampling_is_the_papers() -> None:
    torch.manual_seed(0)
    transformer = moved(SpatialTransformer(2, SpatialTransformerConfig(rate=1.0)))
    cells = torch.randn(2, 2, 4, 6)
    theta = transformer.theta(cells)
    assert (theta - torch.eye(2, 3)).abs().max() > 0.1
    torch.testing.assert_close(transformer(cells), slow_sample(cells, theta), rtol=1e-4, atol=1e-5)


def test_it_starts_at_the_identity_and_learns_from_there() -> None:
    plain, encoder = vit(transforms=False), vit()
    missing = encoder.inner().load_state_dict(plain.inner().state_dict(), strict=False).missing_keys
    assert all(key.startswith("spatial_transformer.") for key in missing)
    pixels = images()
    torch.testing.assert_close(encoder(pixels).tokens, plain(pixels).tokens, rtol=1e-4, atol=1e-5)
    encoder(pixels).pooled.square().sum().backward()
    offset = encoder.inner().spatial_transformer.offset
    assert offset.bias.grad.abs().min() > 0
    moved(encoder.inner().spatial_transformer)
    encoder.zero_grad()
    encoder(pixels).pooled.square().sum().backward()
    assert all(part.grad.any() for part in encoder.inner().spatial_transformer.parameters())


def test_the_rate_slows_and_the_limit_binds() -> None:
    cells = torch.randn(2, 3, 8, 8)
    for rate, limit in ((1.0, None), (0.1, None), (1.0, 0.2)):
        torch.manual_seed(0)
        transformer = SpatialTransformer(3, SpatialTransformerConfig(rate=rate, limit=limit))
        nn.init.constant_(transformer.offset.bias, 0.7)
        offset = transformer.theta(cells) - torch.eye(2, 3)
        expected = 0.7 * rate if limit is None else limit * torch.tanh(torch.tensor(0.7 / limit))
        torch.testing.assert_close(offset, torch.full_like(offset, float(expected)))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("navit", "timesformer")])
def test_any_family_sees_through_one(family: str) -> None:
    spec = FAMILIES[family]
    example = spec.examples[0]
    settings = {**example.settings, **example.small, "spatial_transformer": SpatialTransformerConfig()}
    if family == "timm":
        settings |= {"model": "resnet10t", "args": {}}
    encoder = build_encoder(spec.config(**settings), (64, 64)).eval()
    before = encoder(images((64, 64))).pooled
    moved(encoder.inner().spatial_transformer)
    assert not torch.allclose(encoder(images((64, 64))).pooled, before)
    added = [name for name, _ in encoder.named_parameters() if "spatial_transformer" in name]
    assert len(added) == 6
    assert {depth_of(encoder, f"encoder.{name}") for name in added} == {0}


def test_hidden_pixels_move_nothing() -> None:
    encoder = vit()
    moved(encoder.inner().spatial_transformer)
    hidden = torch.tensor([[[True, False, True], [False, True, False]]] * 2)
    pixels = hidden.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    other = torch.where(pixels, images(seed=9), images())
    for mask in (Mask(drop=hidden), Mask(token=hidden)):
        assert torch.equal(encoder(images(), mask).tokens, encoder(other, mask).tokens)
        assert torch.equal(encoder(images(), mask=mask).tokens, encoder(images(), mask).tokens)
    both = encoder((images(), images((8, 8))), (Mask(token=hidden), None))
    torch.testing.assert_close(both[0].tokens, encoder(images(), Mask(token=hidden)).tokens)
    torch.testing.assert_close(both[1].tokens, encoder(images((8, 8))).tokens)


def test_it_is_saved_and_loaded_and_another_encoder_starts_from_its_rest(tmp_path: Path) -> None:
    encoder = vit()
    moved(encoder.inner().spatial_transformer)
    about = EncoderCard(encoder.config, (16, 24), 3, (0.5,) * 3, (0.2,) * 3, "dino", "class", 1, 1.0, "run")
    assert timm_recipe(about) is None
    save_encoder(tmp_path / "out", encoder.state_dict(), about)
    loaded, _ = load_encoder(tmp_path / "out")
    assert torch.equal(loaded(images()).tokens, encoder(images()).tokens)
    fitted = fit(dict(encoder.inner().state_dict()), vit(transforms=False), (2, 3))
    assert set(fitted.left) == {
        f"spatial_transformer.{n}" for n, _ in encoder.inner().spatial_transformer.named_parameters()
    }
    assert not encoder.takes_windows


def test_it_does_not_wait_for_the_device() -> None:
    features = trace_on_fake_gpu(vit(), images())
    assert features.pooled.device == CUDA


@pytest.mark.parametrize("method", ["mae", "mim", "dino"])
def test_every_method_trains_it(method: str) -> None:
    config = config_of(method, {"family": "vit", **VIT, "patch": 16, "spatial_transformer": {"limit": 0.3}})
    trained = build(config).train()
    trained(random_batch(config), 0)["loss"].backward()
    assert trained.encoder.inner().spatial_transformer.offset.bias.grad.any()
    layers = parameter_groups(trained, 0.5)
    assert sum(len(group["params"]) for group in layers) == sum(p.requires_grad for p in trained.parameters())
