"""Image-text contrast: its losses against the papers' formulas, and in parts against the whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.methods.clip import losses


def rows(seed: int, count: int = 12, dim: int = 6) -> Tensor:
    drawn = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=1).float().requires_grad_(True)


def slow(kind: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As the papers write it, over the whole batch."""
    logits = scale * images @ texts.T + (bias if kind == "siglip" else 0.0)
    if kind == "infonce":
        own = torch.arange(len(images))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    sign = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(images)


def part(kind: str, images: Tensor, texts: Tensor, first: int, whole: losses.Whole, scale: Tensor, bias: Tensor) -> Any:
    if kind == "infonce":
        return losses.infonce(images, texts, first, whole, scale)
    return losses.siglip(images, texts, first, whole, scale, bias)


def whole_of(images: Tensor, texts: Tensor, scale: Tensor) -> losses.Whole:
    images, texts = images.detach(), texts.detach()
    sums = losses.log_sums(images, texts, scale), losses.log_sums(texts, images, scale)
    return losses.Whole(images, texts, *sums)


@pytest.mark.parametrize("at_once", [2**25, 20])  # 20: a row at a time
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_the_mean_over_parts_is_the_batchs(
    kind: str, parts: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_AT_ONCE", at_once)
    images, texts = rows(0), rows(1)
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (7.0, -3.0))
    wanted = slow(kind, images, texts, scale, bias)
    leaves = [images, texts, scale, *([bias] if kind == "siglip" else [])]
    expected = torch.autograd.grad(wanted, leaves)
    whole = whole_of(images, texts, scale)
    size = len(images) // parts
    found = [
        part(kind, images[first : first + size], texts[first : first + size], first, whole, scale, bias)
        for first in range(0, len(images), size)
    ]
    loss = torch.stack([each.loss for each in found]).mean()
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    nearest = (images @ texts.T).argmax(dim=1) == torch.arange(len(images))
    torch.testing.assert_close(torch.stack([each.right for each in found]).mean(), nearest.float().mean())


def test_embeddings_that_are_all_alike_cost_ln_n() -> None:
    same = F.normalize(torch.ones(8, 5), dim=1)
    scale = torch.tensor(100.0)
    found = losses.infonce(same, same, 0, whole_of(same, same, scale), scale)
    assert float(found.loss) == pytest.approx(math.log(8), rel=1e-5)
