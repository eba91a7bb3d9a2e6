"""Stochastic depth that skips, against the form that computes everything and multiplies by zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import CUDA, trace_on_fake_gpu
from torch import Tensor, nn

from data_pipelines.rng import Stream
from pretrain.encoders import Encoder, build_encoder, drop_path
from pretrain.encoders.base import Mask
from pretrain.encoders.drop_path import Draws, drawn, paths_of
from pretrain.encoders.registry import FAMILIES
from pretrain.engines.blocks import recomputed
from pretrain.stream.masking import one_in_2x2, random_units

OURS = [name for name in FAMILIES if name != "timm"]
ROWS = torch.arange(10, 16)


def encoder_of(family: str, rate: float = 0.5) -> Encoder:
    spec = FAMILIES[family]
    example = spec.examples[-1]
    torch.manual_seed(0)
    config = spec.config(**example.settings, **example.small, drop_path=rate)
    encoder = build_encoder(config, (64, 64), mask_token=True).train()
    for parameter in encoder.parameters():  # layer scale and tables start where nothing would show
        nn.init.normal_(parameter, std=0.05)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):  # which knows by itself who shares a micro-batch; here it stands still
            part.eval()
    return encoder


def images(count: int = 6, side: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def learned(encoder: Encoder, *passes: tuple[Any, ...], rows: Tensor = ROWS, step: int = 3) -> list[Tensor]:
    """What passes within one micro-batch give, and the gradients."""
    encoder.zero_grad()
    with drawn(1, step, rows):
        outputs = [encoder(*given).pooled for given in passes]
    torch.cat(outputs).square().sum().backward()
    given = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    return [*[output.detach() for output in outputs], *given]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=rtol, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("family", OURS)
def test_skipping_is_masking(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(family)
    draw = one_in_2x2 if FAMILIES[family].drop_layout == "one_in_2x2" else lambda *to: random_units(*to, 8)
    hidden = torch.from_numpy(np.stack([draw(Stream(row), (4, 4)) for row in range(6)]))
    drop = Mask(drop=hidden, num_visible=int((~hidden[0]).sum()))  # what belongs to an image goes with it
    passes = [(images(),), (images(12, 32),), (images(), drop)]
    monkeypatch.setattr(drop_path, "SKIP_BELOW", 0.0)
    masked = learned(encoder, *passes)
    monkeypatch.setattr(drop_path, "SKIP_BELOW", 1.0)
    skipped = learned(encoder, *passes)
    assert_equal(skipped, masked)
    with torch.no_grad():
        assert not torch.allclose(encoder.eval()(images()).pooled, skipped[0])


@pytest.mark.parametrize("family", OURS)
def test_what_is_dropped_does_not_depend_on_who_shares_the_micro_batch(family: str) -> None:
    encoder = encoder_of(family)
    with torch.no_grad():
        with drawn(1, 3, ROWS):
            whole = torch.stack([encoder(images()).pooled, encoder(images()).pooled])
        halves = []
        for part in (slice(0, 2), slice(2, 6)):
            with drawn(1, 3, ROWS[part]):
                halves.append(torch.stack([encoder(images()[part]).pooled, encoder(images()[part]).pooled]))
        with drawn(1, 4, ROWS):
            later = encoder(images()).pooled
    torch.testing.assert_close(torch.cat(halves, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1])  # another crop, other draws
    assert not torch.allclose(whole[0], later)


def test_as_much_is_dropped_as_is_asked_for_and_all_draws_differ() -> None:
    rates = [0.0, 0.0, 0.1, 0.3, 0.9, 0.5]
    draws = Draws(5, 7, np.arange(500))
    kept = draws.kept(drop_path.ENCODER, rates, 1500)
    assert kept.shape == (1500, 6)
    np.testing.assert_allclose(kept.mean(axis=0), 1 - np.asarray(rates), atol=0.04)
    halves = [Draws(5, 7, np.arange(500)[part]).kept(0, rates, 750) for part in (slice(0, 250), slice(250, 500))]
    again = np.concatenate([half.reshape(3, 250, 6) for half in halves], axis=1)
    np.testing.assert_array_equal(again.reshape(1500, 6), kept)
    others = [draws.kept(0, rates, 500), draws.kept(drop_path.FURTHER, rates, 500), kept[:500]]
    others += [Draws(6, 7, np.arange(500)).kept(0, rates, 500), Draws(5, 8, np.arange(500)).kept(0, rates, 500)]
    for first in range(5):
        for second in range(first):
            assert 0.4 < (others[first][:, 5] == others[second][:, 5]).mean() < 0.6


def test_branches_no_image_keeps_have_gradients_of_zero_and_those_all_keep_are_not_gathered() -> None:
    encoder = encoder_of("vit", rate=0.5)
    blocks = encoder.blocks()
    found: set[tuple[bool, bool]] = set()
    for step in range(20):
        with drawn(0, step, torch.arange(2)):
            path = paths_of(blocks, 2, torch.device("cpu"))[1]
        assert path is not None
        found.add((path.mlp.rows is None, float(path.mlp.weights.sum()) == 0))
        if float(path.mlp.weights.sum()) == 0:
            learned(encoder, (images(2),), rows=torch.arange(2), step=step)
            found.add((False, False))
    assert found == {(True, False), (False, False), (False, True)}


def test_without_drop_path_nothing_changes_to_the_digit() -> None:
    encoder = encoder_of("vit", rate=0.0)
    plain = encoder(images()).pooled
    with drawn(0, 0, ROWS):
        assert torch.equal(encoder(images()).pooled, plain)
    dropping = encoder_of("vit", rate=0.5).eval()
    with drawn(0, 0, ROWS):
        assert torch.equal(dropping(images()).pooled, plain)


def test_recomputed_and_compiled_blocks_drop_the_same() -> None:
    plain = learned(encoder_of("vit"), (images(),), (images(12, 32),))
    again = encoder_of("vit")
    for block in again.blocks():
        block.forward = recomputed(block.forward)
    assert_equal(learned(again, (images(),), (images(12, 32),)), plain)
    for block in again.blocks():
        block.compile(dynamic=True, backend="eager")
    assert_equal(learned(again, (images(),), (images(12, 32),)), plain)


def test_parts_of_views_are_refused() -> None:
    encoder = encoder_of("vit")
    with drawn(0, 0, ROWS), pytest.raises(ValueError, match="7 images in a micro-batch of 6 rows"):
        encoder(images(7))


class InTraining(nn.Module):
    """A pass within `drawn`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, given: Tensor, rows: np.ndarray) -> Tensor:
        draws = drop_path._draws.set(Draws(0, 0, rows))
        try:
            return self.encoder(given).pooled
        finally:
            drop_path._draws.reset(draws)


@pytest.mark.parametrize("family", ["vit", "swin", "pvt"])
def test_drawing_does_not_wait_for_the_device(family: str) -> None:
    module = InTraining(encoder_of(family))
    assert trace_on_fake_gpu(module, images(), np.arange(6)).device == CUDA
