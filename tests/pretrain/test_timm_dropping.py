"""timm's models that leave hidden units out, and their stochastic depth, against slow forms of the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from einops import rearrange
from test_timm_model import SMALL, images, make
from timm.models.convit import GPSA
from torch import Tensor

from pretrain.encoders import Encoder, drop_path
from pretrain.encoders.base import Mask, refine
from pretrain.encoders.drop_path import Draws, drawn
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.timm.convit import PlacedAttention
from pretrain.encoders.timm.drawn_paths import drop_paths
from pretrain.encoders.timm.survey import survey
from pretrain.engines.blocks import recomputed

DROPS = [
    "cait_xxs24_224",
    "convit_tiny",
    "eva02_tiny_patch14_224",
    "naflexvit_base_patch16_gap",
    "vit_tiny_patch16_224",
]
#: Beside: a model with rotary positions of each head and block.
MIXED = {"embed_dim": 48, "depth": 2, "num_heads": 2}
SIZE = (64, 96)


def dropped_units(ratio: float = 0.5) -> Tensor:
    order = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)).argsort(dim=1).argsort(dim=1)
    return (order < int(24 * ratio)).unflatten(1, (4, 6))


def spread(encoder: Encoder) -> None:
    """Move parameters away from a start at which positions, gates and scales say nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("name", DROPS)
def test_dropped_units_are_not_there(name: str) -> None:
    encoder = make(name, SIZE)
    spread(encoder)
    dropped = dropped_units()
    pixels = refine(dropped, SIZE)[:, None]
    first, second = images(SIZE), torch.where(pixels, images(SIZE, 1), images(SIZE))
    given = encoder(first, Mask(drop=dropped, num_visible=12))
    assert given.tokens.shape == (2, 12, encoder.dim)
    assert given.grid is None
    assert given.ids_keep is not None
    shown = [(~row).flatten().nonzero().flatten().tolist() for row in dropped]
    assert given.ids_keep[..., 0].tolist() == shown
    other = encoder(second, Mask(drop=dropped))
    assert torch.equal(given.tokens, other.tokens)
    assert torch.equal(given.pooled, other.pooled)
    moved = encoder(first.roll(16, dims=-1), Mask(drop=dropped.roll(1, dims=-1)))  # the same patches elsewhere
    assert not torch.allclose(given.pooled, moved.pooled, atol=1e-3)
    whole = encoder(first)
    nothing = encoder(first, Mask(drop=torch.zeros_like(dropped)))
    torch.testing.assert_close(nothing.tokens, whole.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nothing.pooled, whole.pooled, rtol=1e-4, atol=1e-5)
    encoder.zero_grad()
    learned = encoder.train()(first, Mask(drop=dropped))
    (learned.tokens.square().sum() + learned.pooled.square().sum()).backward()
    without = [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
    assert set(without) <= {"mask_token"}


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "mixed", "vit_tiny_patch16_224"])
def test_dropping_is_attending_to_the_visible_alone(name: str) -> None:
    """Against all tokens with an attention mask that shows nobody the hidden ones."""
    args = MIXED if name == "mixed" else SMALL[name]
    model = "vit_small_patch16_rope_mixed_224" if name == "mixed" else name
    encoder = make(model, SIZE, args=args)
    spread(encoder)
    dropped = dropped_units()
    tokens = encoder(images(SIZE), Mask(drop=dropped)).tokens
    attended = torch.ones(2, 1, 1, encoder.survey.num_prefix + 24, dtype=torch.bool)
    attended[..., encoder.survey.num_prefix :] = ~rearrange(dropped, "b h w -> b 1 1 (h w)")
    states = encoder.model.forward_features(images(SIZE), attn_mask=attended)[:, encoder.survey.num_prefix :]
    for row in range(2):
        torch.testing.assert_close(tokens[row], states[row][~dropped[row].flatten()], rtol=1e-4, atol=1e-4)


def slow_gpsa(attention: GPSA, x: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """Gated positional attention (d'Ascoli et al. 2021, equation 7) of one image, row by row and head by head."""
    heads, dim = attention.num_heads, x.shape[-1] // attention.num_heads
    queries, keys = attention.qk(x).chunk(2, dim=-1)
    values, mixed = attention.v(x), torch.zeros_like(x)
    gates = torch.sigmoid(attention.gating_param)
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        for i, (row, column) in enumerate(places):
            content = torch.stack([queries[i, part] @ key * dim**-0.5 for key in keys[:, part]]).softmax(dim=0)
            offsets = [(other[1] - column, other[0] - row) for other in places]
            numbers = torch.tensor([[dx, dy, dx * dx + dy * dy] for dx, dy in offsets], dtype=torch.float32)
            position = (numbers @ attention.pos_proj.weight[head] + attention.pos_proj.bias[head]).softmax(dim=0)
            weights = (1 - gates[head]) * content + gates[head] * position
            mixed[i, part] = (weights / weights.sum()) @ values[:, part]
    return attention.proj(mixed)


def test_convits_positions_belong_to_their_patches() -> None:
    encoder = make("convit_tiny", SIZE)
    spread(encoder)
    attention = next(part for part in encoder.modules() if isinstance(part, PlacedAttention))
    assert attention.grid == (4, 6)
    states = torch.randn(2, 5, encoder.dim, generator=torch.Generator().manual_seed(1))
    attention.shown = torch.tensor([[0, 3, 9, 10, 23], [1, 2, 5, 11, 12]])
    ours = attention(states)
    for row in range(2):
        places = [divmod(unit, 6) for unit in attention.shown[row].tolist()]
        torch.testing.assert_close(ours[row], slow_gpsa(attention, states[row], places), rtol=1e-4, atol=1e-5)
    attention.shown = None
    square = make("convit_tiny", (64, 64))
    spread(square)
    theirs = timm.create_model("convit_tiny", num_classes=0, **square.survey.arguments)
    theirs.load_state_dict(square.model.state_dict())
    outputs = []
    for model in (square.model, theirs):
        model.train()(images()).square().sum().backward()
        outputs.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(outputs[0]) == len(outputs[1])
    for own, other in zip(*outputs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * max(1e-2, float(other.abs().max())))


def dropping(name: str, rate: float = 0.5, side: int = 64) -> Any:
    args = {"depth": [[1, 1, 0], [1, 1, 0]]} if name == "crossvit_9_240" else {}
    encoder = make(name, (side, side), mask_token=False, drop_path=rate, args=SMALL[name] | args).train()
    spread(encoder)
    return encoder


STOCHASTIC = ["cait_xxs24_224", "convit_tiny", "convnext_tiny", "crossvit_9_240", "vit_tiny_patch16_224"]
ROWS = torch.arange(10, 14)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_paths_dropped_do_not_depend_on_micro_batches(name: str) -> None:
    """One micro-batch of four rows and two crops against two of two: outcome and gradients."""
    side = 120 if name == "crossvit_9_240" else 64
    encoder = dropping(name, side=side)
    assert drop_paths(encoder.model)
    crops = [torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def learned(*parts: slice, step: int = 3) -> tuple[Tensor, list[Tensor]]:
        encoder.zero_grad()
        outputs = []
        for part in parts:
            with drawn(1, step, ROWS[part]):
                pooled = encoder(torch.cat([crop[part] for crop in crops])).pooled
            pooled.square().sum().backward()
            outputs.append(rearrange(pooled.detach(), "(v b) d -> v b d", v=2))
        return torch.cat(outputs, dim=1), [part.grad.clone() for part in encoder.parameters() if part.grad is not None]

    whole, gradients = learned(slice(0, 4))
    halves, summed = learned(slice(0, 2), slice(2, 4))
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-5)
    for own, other in zip(summed, gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * max(1.0, float(other.abs().max())))
    later, _ = learned(slice(0, 4), step=4)
    assert not torch.allclose(later, whole, atol=1e-3)
    with torch.no_grad():
        assert not torch.allclose(encoder.eval()(crops[0]).pooled, whole[0], atol=1e-3)


def test_a_path_is_its_branch_times_what_was_drawn() -> None:
    encoder = dropping("vit_tiny_patch16_224")
    part = drop_paths(encoder.model)[0]
    seen: list[tuple[Tensor, Tensor]] = []
    part.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with drawn(1, 3, ROWS):
        encoder(images()[:1].expand(4, -1, -1, -1))
    kept = Draws(1, 3, ROWS.numpy()).kept(drop_path.ENCODER, [p.drop_prob for p in drop_paths(encoder.model)], 4)
    before, after = seen[0]
    factors = torch.from_numpy(kept[:, 0].astype(np.float32)) / (1 - part.drop_prob)
    assert torch.equal(after, before * factors.view(-1, 1, 1))
    assert {0.0, 2.0} == set(factors.tolist())


def test_blocks_computed_again_drop_the_same() -> None:
    """Over two passes of one step, whose draws differ."""
    gradients = []
    for again in (False, True):
        encoder = dropping("vit_tiny_patch16_224")
        for block in encoder.blocks() if again else []:
            block.forward = recomputed(block.forward)
        with drawn(1, 3, ROWS[:2]):
            pooled = torch.stack([encoder(images()).pooled, encoder(images()).pooled])
        assert not torch.allclose(*pooled.unbind())
        pooled.square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


def test_branches_with_a_row_for_each_place_are_dropped_image_by_image() -> None:
    encoder = dropping("vit_tiny_patch16_224")
    part = drop_paths(encoder.model)[0]
    part.hand([torch.tensor([0.0, 2.0])])
    assert part(torch.ones(4, 1)).flatten().tolist() == [0.0, 0.0, 2.0, 2.0]
    part.hand([torch.tensor([0.0, 2.0])])
    with pytest.raises(ValueError, match="3 rows for 2 images"):
        part(torch.ones(3, 1))


def test_no_model_drops_paths_unasked() -> None:
    """FocalNet's own default in timm is .1."""
    with torch.device("meta"):
        theirs = timm.create_model("focalnet_tiny_srf")
    assert any(getattr(part, "drop_prob", 0.0) > 0 for part in theirs.modules())
    assert survey(TimmConfig(model="focalnet_tiny_srf"), (64, 64)).drop_calls == ()


def test_sizes_that_a_model_wants_are_named() -> None:
    with pytest.raises(ValueError, match=r"does not run on images of 100x100.*=\[120, 120\] or .*\[240, 240\]"):
        make("crossvit_9_240", (100, 100), mask_token=False)
    found = survey(TimmConfig(model="levit_128s", args=SMALL["levit_128s"]), (112, 112))
    assert found.unmaskable == (
        "its tokens hold no whole patches of 16 px: take views.global_crops whose sides are multiples of 64 px"
    )
    assert found.grid == (2, 2)
    with pytest.raises(ValueError, match="multiples of 64 px"):
        make("levit_128s", (112, 112))
