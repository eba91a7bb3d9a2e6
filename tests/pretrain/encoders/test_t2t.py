"""T2T-ViT: its steps and performers in loops, published sizes, the authors' layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.saved import load_encoder
from pretrain.encoders.t2t.config import T2tConfig
from pretrain.encoders.t2t.encoder import T2tEncoder, line_positions
from pretrain.encoders.t2t.tokens import PerformerLayer, TokensToToken, TransformerLayer
from pretrain.encoders.transfer import fit
from pretrain.interop.official import import_checkpoint

SMALL: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 2, "token_dim": 8, "mlp_ratio": 2.0}


def make(size: tuple[int, int] = (64, 64), channels: int = 3, **settings: Any) -> T2tEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(T2tConfig(**{**SMALL, **settings}), size, channels, mask_token=True).eval()
    spread(encoder)
    return encoder


def spread(module: nn.Module) -> None:
    """Away from a start at which biases say nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in module.parameters():
            if value.requires_grad:
                value.add_(torch.rand(value.shape, generator=generator).to(value) * 0.2)


def images(size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def slow_layer(layer: nn.Module, windows: Tensor) -> Tensor:
    """A layer between the steps, with the weight of every pair of tokens written out."""
    x = layer.norm1(windows)
    if isinstance(layer, PerformerLayer):
        key, query, value = layer.kqv(x).chunk(3, dim=-1)
        count = len(layer.w)
        feature = [
            torch.stack([(v @ row - (v * v).sum(-1) / 2).exp() / math.sqrt(count) for row in layer.w], dim=-1)
            for v in (query, key)
        ]
        weights = feature[0] @ feature[1].mT
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
        states = value + layer.proj(weights @ value)
    else:
        assert isinstance(layer, TransformerLayer)
        query, key, value = layer.attn.qkv(x).chunk(3, dim=-1)
        weights = (query @ key.mT * windows.shape[-1] ** -0.5).softmax(dim=-1)  # of the input's width
        states = value + layer.attn.proj(weights @ value)
    return states + layer.mlp(layer.norm2(states))


def slow_tokens(module: TokensToToken, images: Tensor) -> Tensor:
    """The three steps with their windows cut out one by one, features in the order channel, row, column."""
    cells = images
    for step, (side, stride, padding) in enumerate(((7, 4, 2), (3, 2, 1), (3, 2, 1))):
        padded = F.pad(cells, [padding] * 4)
        rows, columns = cells.shape[2] // stride, cells.shape[3] // stride
        windows = torch.stack(
            [
                padded[:, :, stride * y : stride * y + side, stride * x : stride * x + side].flatten(1)
                for y in range(rows)
                for x in range(columns)
            ],
            dim=1,
        )
        layer = (module.attention1, module.attention2, None)[step]
        states = module.project(windows) if layer is None else slow_layer(layer, windows)
        cells = rearrange(states, "b (h w) d -> b d h w", h=rows)
    return rearrange(cells, "b d h w -> b h w d")


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_the_steps_are_the_papers(kind: str) -> None:
    torch.manual_seed(0)
    module = TokensToToken(kind, 2, 4, 6, 0.0).double()
    spread(module)
    pixels = torch.randn(2, 2, 32, 48, dtype=torch.float64, requires_grad=True)
    found, expected = module(pixels), slow_tokens(module, pixels)
    assert found.shape == (2, 2, 3, 6)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64)
    inputs = [pixels, *(p for p in module.parameters() if p.requires_grad)]
    gradients = [torch.autograd.grad((tokens * weights).sum(), inputs) for tokens in (found, expected)]
    for own, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(own, slow)


def test_directions_are_orthogonal_and_not_trained() -> None:
    layer = PerformerLayer(12, 8, 0.0)
    torch.testing.assert_close(layer.w @ layer.w.T, 4 * torch.eye(4), rtol=0, atol=1e-5)  # rows of length sqrt(m)
    assert not layer.w.requires_grad
    assert not torch.equal(layer.w, PerformerLayer(12, 8, 0.0).w)


@pytest.mark.parametrize("kind", ["performer", "transformer"])
@pytest.mark.parametrize("size", [(64, 64), (32, 64)])
def test_hidden_pixels_change_nothing(kind: str, size: tuple[int, int]) -> None:
    encoder = make(size, tokens=kind)
    hidden = torch.zeros(2, size[0] // 16, size[1] // 16, dtype=torch.bool)
    hidden[:, ::2, 1:] = True
    pixels = hidden.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)[:, None]
    other = torch.where(pixels, images(size, seed=9), images(size))
    for mask in (Mask(drop=hidden), Mask(token=hidden)):
        assert torch.equal(encoder(images(size), mask).tokens, encoder(other, mask).tokens)


def test_positions_are_of_the_line_and_fixed() -> None:
    encoder = make()
    table = encoder.net.pos_embed
    assert not table.requires_grad
    for place in (0, 1, 16):
        for channel in (0, 5, 23):
            angle = place / 10000 ** (2 * (channel // 2) / 24)
            wave = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert float(table[0, place, channel]) == pytest.approx(wave, abs=1e-6)
    assert torch.equal(table, line_positions(17, 24))
    assert encoder(images((32, 96))).grid == (2, 6)


def test_published_sizes() -> None:
    """Parameters in M, of the authors' README; classifier included."""
    for size, kind, millions in ((7, "performer", 4.3), (14, "performer", 21.5), (19, "transformer", 39.2)):
        with torch.device("meta"):
            encoder = T2tEncoder(T2tConfig(size=size, tokens=kind), (224, 224))  # type: ignore[arg-type]
        count = sum(parameter.numel() for parameter in encoder.parameters()) + encoder.dim * 1000 + 1000
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_the_authors_layout(kind: str, tmp_path: Path) -> None:
    theirs = make(tokens=kind)
    state = {f"module.{key}": value for key, value in theirs.net.state_dict().items()}
    state |= {"module.head.weight": torch.zeros(7, 24), "module.head.bias": torch.zeros(7)}
    last = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": last, "state_dict_ema": state}, tmp_path / "file.pth")
    found = import_checkpoint(tmp_path / "file.pth", "t2t", tmp_path / "out", overrides=["heads=2"])
    assert set(found.left) == {"head.weight", "head.bias", "[epoch]", "[state_dict]"}
    assert (found.encoder.tokens, found.encoder.token_dim, found.encoder.hidden) == (kind, 8, 48)
    encoder, card = load_encoder(tmp_path / "out")
    assert (card.channels, card.image_size) == (3, (64, 64))
    assert torch.equal(encoder(images()).tokens, theirs(images()).tokens)
    newest = import_checkpoint(tmp_path / "file.pth", "t2t", tmp_path / "last", overrides=["heads=2"], which="student")
    assert "[state_dict_ema]" in newest.left
    assert not load_encoder(tmp_path / "last")[0].net.norm.weight.any()


def test_other_channels_read_a_grey_image_alike() -> None:
    grey = make(channels=1, tokens="performer")
    fitted = fit(dict(make().net.state_dict()), grey, (4, 4))
    assert set(fitted.resized) == {
        f"tokens_to_token.attention1.{n}" for n in ("norm1.weight", "norm1.bias", "kqv.weight")
    }
    assert not fitted.left
    grey.net.load_state_dict(fitted.weights)
    colour = make()
    for part in (grey, colour):  # of equal channels, which norm and mean over channels treat alike
        nn.init.ones_(part.net.tokens_to_token.attention1.norm1.weight)
        nn.init.zeros_(part.net.tokens_to_token.attention1.norm1.bias)
    pixels = images()[:, :1]
    with torch.no_grad():
        expected = colour(pixels.expand(-1, 3, -1, -1)).tokens
        torch.testing.assert_close(grey(pixels).tokens, expected, rtol=1e-4, atol=1e-4)


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in (
        ({"dim": 100, "heads": 3}, "dim 100 does not divide into 3 heads"),
        ({"token_dim": 7}, "token_dim 7 must be even"),
        ({"tokens": "transformer", "token_dropout": 0.1}, "set tokens=performer or token_dropout=0"),
    ):
        with pytest.raises(ValueError, match=message):
            T2tConfig(**settings)
