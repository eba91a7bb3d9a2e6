"""Visual transformers of tokens: the paper's formulas in loops, masks, depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.encoders import build_encoder, drop_path
from pretrain.encoders.base import Mask
from pretrain.encoders.shapes import SpatialTransformerConfig
from pretrain.encoders.visual_transformer.config import VisualTransformerConfig
from pretrain.encoders.visual_transformer.encoder import TokenBlock, VisualTransformerEncoder

SMALL: dict[str, Any] = {"dim": 8, "depths": (1, 1), "tokens": 3}


def make(size: tuple[int, int] = (32, 32), **settings: Any) -> VisualTransformerEncoder:
    torch.manual_seed(0)
    return build_encoder(VisualTransformerConfig(**{**SMALL, **settings}), size, mask_token=True).eval()


def images(size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def slow_block(block: TokenBlock, cells: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Equations 1 to 5 of the paper, with every weight of a sum written out."""
    batch, _, height, width = cells.shape
    maps, kept = [], []
    for image in range(batch):
        x = torch.stack([cells[image, :, row, column] for row in range(height) for column in range(width)])
        scores = x @ (block.filters.T if before is None else (before[image] @ block.look.weight.T).T)
        shares = scores.exp() / scores.exp().sum(dim=0)  # over pixels
        tokens = shares.T @ (x @ block.value.weight.T)
        scores = (tokens @ block.key.weight.T) @ (tokens @ block.query.weight.T).T
        tokens = tokens + scores.exp() / scores.exp().sum(dim=1, keepdim=True) @ tokens
        tokens = tokens + (tokens @ block.fc1.weight.T).clamp(min=0) @ block.fc2.weight.T
        scores = (x @ block.back_query.weight.T) @ (tokens @ block.back_key.weight.T).T
        shares = scores.exp() / scores.exp().sum(dim=1, keepdim=True)  # over tokens
        x = x + shares @ (tokens @ block.back_value.weight.T)
        maps.append(x.T.reshape(-1, height, width))
        kept.append(tokens)
    return torch.stack(maps), torch.stack(kept)


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_block_is_the_papers(recurrent: bool) -> None:
    torch.manual_seed(0)
    block = TokenBlock(6, 4, recurrent, 0.0).double()
    cells = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True) if recurrent else None
    found, expected = block(cells, before), slow_block(block, cells, before)
    inputs = [cells, *([before] if recurrent else []), *block.parameters()]
    gradients = []
    for mixed, tokens in (found, expected):
        gradients.append(torch.autograd.grad(mixed.square().sum() + tokens.sum(), inputs))
    for own, slow in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(own, slow)


def test_a_dropped_projection_leaves_the_tokens() -> None:
    torch.manual_seed(0)
    block, cells = TokenBlock(6, 4, False, 0.5).train(), torch.randn(3, 6, 2, 2)
    kept = torch.tensor([0, 2])
    everything = drop_path.Branch(None, torch.ones(3))
    paths = drop_path.Paths(drop_path.Branch(kept, torch.full((2,), 2.0)), everything)
    mixed, tokens = block(cells, None, paths)
    whole, same = block.eval()(cells, None)
    torch.testing.assert_close(tokens, same)
    assert torch.equal(mixed[1], cells[1])
    torch.testing.assert_close(mixed[kept] - cells[kept], 2 * (whole[kept] - cells[kept]))


def test_later_blocks_look_with_the_tokens_before_or_with_filters() -> None:
    for tokenizer, recurrent in (("recurrent", [False, True]), ("filter", [False, False])):
        encoder = make(tokenizer=tokenizer)
        assert [block.recurrent for block in encoder.net.visual_blocks] == recurrent
        encoder(images()).pooled.square().sum().backward()
        without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == ["mask_token"]


@pytest.mark.parametrize("straightened", [None, SpatialTransformerConfig()])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_hidden_pixels_change_nothing(straightened: SpatialTransformerConfig | None, size: tuple[int, int]) -> None:
    encoder = make(size, straightened=straightened)
    if straightened is not None:
        torch.nn.init.normal_(encoder.net.straighten.offset.weight)
    hidden = torch.ones(2, size[0] // 8, size[1] // 8, dtype=torch.bool)
    hidden[:, ::2, 1::2] = False  # one visible unit in every 2x2
    pixels = hidden.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    other = torch.where(pixels, images(size, seed=9), images(size))
    for mask in (Mask(drop=hidden), Mask(token=hidden)):
        assert torch.equal(encoder(images(size), mask).tokens, encoder(other, mask).tokens)
    features = encoder(images((16, 48)), layers=(0, 1, -1))
    assert [layer.grid for layer in features.layers] == [(4, 12), (2, 6), (2, 6)]


def test_layers_and_settings() -> None:
    encoder = make(straightened=SpatialTransformerConfig())
    layers = {name: encoder.layer_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert layers["mask_token"] == layers["net.stem.norm.weight"] == 0
    assert layers["net.stages.1.0.conv1.weight"] == 2
    assert layers["net.straighten.offset.bias"] == layers["net.visual_blocks.0.filters"] == 3
    assert layers["net.visual_blocks.1.look.weight"] == encoder.depth == 4
    assert encoder.stage_ends() == (0, 3)
    with pytest.raises(ValueError, match="dim is 7; keys of visual tokens are half as wide"):
        VisualTransformerConfig(dim=7)
