"""Images of several sizes in one pass, against a pass for each size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.encoders import Encoder, build_encoder, packed
from pretrain.encoders.base import Mask, several_passes
from pretrain.encoders.drop_path import drawn
from pretrain.encoders.packed import Packed, within_groups
from pretrain.encoders.vit.config import VitConfig
from pretrain.engines.blocks import recomputed

ROWS = torch.arange(6)
HIDDEN = Mask(token=torch.arange(12 * 64).view(12, 8, 8) % 3 == 0)


def images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(side))


PASSES = ((images(12, 64), HIDDEN), (images(24, 32), None))


def student(rate: float) -> Encoder:
    torch.manual_seed(0)
    config = VitConfig(dim=32, depth=3, heads=2, patch=8, drop_path=rate, layer_scale=0.5, registers=1)
    return build_encoder(config, (64, 64), mask_token=True).train()


def learned(encoder: Encoder, packs: bool, step: int = 0) -> list[Tensor]:
    """Outputs and gradients."""
    encoder.packs = packs
    encoder.zero_grad()
    with drawn(0, step, ROWS):
        seen = several_passes(encoder, PASSES)
    sum(part.square().sum() for each in seen for part in (each.pooled, each.tokens)).backward()
    assert [each.grid for each in seen] == [(8, 8), (4, 4)]
    outputs = [part.detach() for each in seen for part in (each.pooled, each.tokens, each.prefix_tokens)]
    return outputs + [parameter.grad for parameter in encoder.parameters()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6])
def test_one_pass_is_two(rate: float) -> None:
    encoder = student(rate)
    for step in range(3):
        assert_equal(learned(encoder, True, step), learned(encoder, False, step))


def test_recomputed_and_compiled_blocks_give_the_same_in_one_pass() -> None:
    expected, encoder = learned(student(0.5), False), student(0.5)
    for block in encoder.blocks():
        block.forward = recomputed(block.forward)
    assert_equal(learned(encoder, True), expected)
    for block in encoder.blocks():
        block.compile(dynamic=True, backend="eager")
    assert_equal(learned(encoder, True), expected)


def test_sequences_are_packed_in_order_and_come_back() -> None:
    batches = [torch.randn(2, 5, 4), torch.randn(1, 5, 4), torch.randn(3, 2, 4)]
    sequences = Packed.of(batches)
    assert sequences.lengths == (5, 5, 5, 2, 2, 2)
    assert sequences.groups == ((3, 5), (3, 2))
    first, second = sequences.unpacked()
    assert torch.equal(first, torch.cat(batches[:2]))
    assert torch.equal(second, batches[2])
    mixed = within_groups(
        sequences.tokens, sequences.groups, lambda part: part.mean(dim=1, keepdim=True).expand_as(part)
    )
    torch.testing.assert_close(mixed[:5], batches[0][0].mean(dim=0).expand(5, -1))
    torch.testing.assert_close(mixed[-2:], batches[2][2].mean(dim=0).expand(2, -1))


@pytest.mark.parametrize(("width", "calls"), [(64, 1), (60, 0), (264, 0)])
def test_heads_that_the_kernel_refuses_are_attended_group_by_group(
    width: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is not there."""
    groups, seen = tuple((1, length) for length in range(2, 8)), []
    assert len(groups) > packed.MOST_CALLS
    monkeypatch.setattr(packed, "attend_at_once", lambda qkv, heads, groups: seen.append(qkv))
    with FakeTensorMode():
        qkv = torch.empty(sum(length for _, length in groups), 3 * 2 * width, dtype=torch.bfloat16, device="cuda")
        packed.attend_packed(qkv, 2, groups)
    assert len(seen) == calls
