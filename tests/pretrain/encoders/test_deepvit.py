"""DeepViT: re-attention in loops, batch norms over all images, published sizes, the authors' layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.encoders import build_encoder, drop_path
from pretrain.encoders.base import Mask
from pretrain.encoders.deepvit.config import DeepVitConfig
from pretrain.encoders.deepvit.encoder import DeepVitEncoder, ReAttention
from pretrain.encoders.saved import load_encoder
from pretrain.encoders.sequence import ResidualBlock
from pretrain.interop.official import import_checkpoint

SMALL: dict[str, Any] = {"dim": 24, "depth": 3, "heads": 4, "reattention": 2, "patch": 8}


def make(size: tuple[int, int] = (32, 32), **settings: Any) -> DeepVitEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(DeepVitConfig(**{**SMALL, **settings}), size, mask_token=True).eval()
    spread(encoder)
    return encoder


def spread(module: nn.Module) -> None:
    """Away from a start at which norms say nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
            value.add_(torch.rand(value.shape, generator=generator).to(value) * 0.2)


def images(size: tuple[int, int] = (32, 32), count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def slow_reattention(attention: ReAttention, states: Tensor) -> Tensor:
    """Section 4.2 of the paper, head by head, with the norm's statistics over images, queries and keys."""
    heads, width = attention.heads, states.shape[-1] // attention.heads
    query, key, value = attention.qkv(states).chunk(3, dim=-1)
    parts = [slice(head * width, (head + 1) * width) for head in range(heads)]
    maps = [(query[..., p] @ key[..., p].mT / width**0.5).softmax(dim=-1) for p in parts]
    matrix, norm, out = attention.reatten_matrix, attention.var_norm, []
    for head, part in enumerate(parts):
        mixed = sum(matrix.weight[head, other, 0, 0] * maps[other] for other in range(heads)) + matrix.bias[head]
        if attention.training:
            mean, variance = mixed.mean(), mixed.var(unbiased=False)
        else:
            mean, variance = norm.running_mean[head], norm.running_var[head]
        mixed = (mixed - mean) / (variance + norm.eps) ** 0.5 * norm.weight[head] + norm.bias[head]
        out.append(attention.scale * mixed @ value[..., part])
    return attention.proj(torch.cat(out, dim=-1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_reattention_is_the_papers(training: bool, scaled: bool) -> None:
    torch.manual_seed(0)
    attention = ReAttention(12, 3, scaled).double().train(training)
    spread(attention)
    states = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    inputs = [states, *attention.parameters()]
    expected = slow_reattention(attention, states)
    found = attention(states)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64)
    for own, slow in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(own, slow)


def test_the_last_blocks_reattend_and_branches_are_scaled() -> None:
    encoder = make(branch_scale=0.5)
    assert [isinstance(block.attn, ReAttention) for block in encoder.blocks()] == [False, True, True]
    block, states = encoder.blocks()[0], torch.randn(2, 5, 24)
    middle = states + block.attn(block.norm1(states * 0.5)) / 0.5
    torch.testing.assert_close(block(states), middle + block.mlp(block.norm2(middle * 0.5)) / 0.5)
    further = encoder.further_blocks(2, after=1)
    assert [isinstance(block.attn, ReAttention) for block in further.blocks] == [True, True]
    assert further(states, (2, 2)).shape == states.shape


def test_a_dropped_path_takes_no_image_out_of_the_batch_norm() -> None:
    """What the kept images get is what they get where the dropped ones are computed and multiplied by zero."""
    torch.manual_seed(0)
    block = ResidualBlock(12, ReAttention(12, 3, False), nn.Identity(), 0.5, 1e-6, whole_batches=True).train()
    states, kept = torch.randn(4, 5, 12), torch.tensor([0, 2, 3])
    everything = drop_path.Branch(None, torch.ones(4))
    paths = drop_path.Paths(drop_path.Branch(kept, torch.full((3,), 2.0)), everything)
    weights = torch.tensor([2.0, 0.0, 2.0, 2.0])[:, None, None]
    middle = states + weights * block.attn(block.norm1(states))
    torch.testing.assert_close(block(states, paths), middle + block.norm2(middle))


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_hidden_pixels_change_nothing(stem: str, size: tuple[int, int]) -> None:
    encoder = make(size, stem=stem)
    hidden = torch.zeros(2, size[0] // 8, size[1] // 8, dtype=torch.bool)
    hidden[:, ::2, 1:] = True
    pixels = hidden.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    other = torch.where(pixels, images(size, seed=9), images(size))
    for mask in (Mask(drop=hidden), Mask(token=hidden)):
        assert torch.equal(encoder(images(size), mask).tokens, encoder(other, mask).tokens)
    visible = encoder(images(size), Mask(drop=hidden))
    assert visible.ids_keep is not None
    assert visible.ids_keep[0, :, 0].tolist() == (~hidden[0]).flatten().nonzero().flatten().tolist()


def test_positions_belong_to_their_tokens() -> None:
    """With positions alone (no pixels), a visible token is the same one wherever it stands in the sequence."""
    encoder = make(stem="patch")
    hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[0, :2], hidden[1, 2:] = True, True
    swapped = encoder(images(), Mask(drop=hidden.flip(0)))
    straight = encoder(images().flip(0), Mask(drop=hidden))
    torch.testing.assert_close(swapped.tokens, straight.tokens.flip(0))
    assert not torch.allclose(straight.tokens[0], encoder(images().flip(0), Mask(drop=hidden.flip(0))).tokens[0])


def test_the_published_size() -> None:
    with torch.device("meta"):
        encoder = DeepVitEncoder(DeepVitConfig(), (224, 224))
    count = sum(parameter.numel() for parameter in encoder.parameters()) + encoder.dim * 1000 + 1000
    assert count / 1e6 == pytest.approx(27, abs=0.5)  # M (table 4), classifier included


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_the_authors_layout(stem: str, tmp_path: Path) -> None:
    theirs = make(stem=stem)
    state = {f"module.{key}": value for key, value in theirs.net.state_dict().items()}
    state |= {"module.head.weight": torch.zeros(7, 24), "module.head.bias": torch.zeros(7)}
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    given = ["branch_scale=0.5", "reattention_scaled=true"]
    found = import_checkpoint(tmp_path / "file.pth", "deepvit", tmp_path / "out", overrides=given)
    assert set(found.left) == {"head.weight", "head.bias"}
    assert found.encoder.mixed == (2, True)
    assert dataclasses.replace(found.encoder, depth=None, reattention=None).shape[1] == 16
    encoder, _ = load_encoder(tmp_path / "out")
    assert torch.equal(encoder(images()).tokens, theirs(images()).tokens)
    state["module.blocks.0.attn.reatten_matrix.weight"] = torch.zeros(4, 4, 1, 1)
    del state["module.blocks.1.attn.reatten_matrix.weight"]
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"blocks \[0, 2\] have re-attention; ours has it in the last"):
        import_checkpoint(tmp_path / "file.pth", "deepvit", tmp_path / "again")


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in (
        ({"dim": 100}, "dim 100 does not divide into 12 heads"),
        ({"depth": 3}, "reattention is 5 blocks of 3"),
        ({"patch": 7}, "patch is 7; the convolutional stem halves"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepVitConfig(**settings)


def test_layers_rise_from_the_embedding_to_the_norm() -> None:
    encoder = make()
    layers = {name: encoder.layer_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert layers["mask_token"] == layers["net.cls_token"] == layers["net.patch_embed.bn1.weight"] == 0
    assert layers["net.blocks.1.norm1.weight"] == 2
    assert layers["net.norm.weight"] == encoder.depth + 1
