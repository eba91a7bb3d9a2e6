"""Our AdamW against torch's: the same numbers, from whole parameters and from parts, with bad steps left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.engines.adamw import AdamW, Stretch
from pretrain.engines.ema import update_ema

SHAPES = [(5, 3), (7,), (2, 2, 2)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def groups_of(whole: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": [whole[0], whole[2]], "lr": 0.1, "weight_decay": 0.3},
        {"params": [whole[1]], "lr": 0.02, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_it_is_adamw_with_clipping(clip: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(groups_of(ours), (0.9, 0.95), 1e-8, clip)
    reference = torch.optim.AdamW(groups_of(theirs), betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        for one, other, gradient in zip(ours, theirs, gradients(step), strict=True):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
        optimizer.step()
        reference.step()
        assert float(optimizer.norm) == pytest.approx(float(norm))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_parameters_in_one_flat_tensor_learn_the_same() -> None:
    """As under ZeRO: one group for who looks, the rates of each, a part of a parameter, and padding."""
    whole, parts = parameters(), parameters()
    by_parameter, flat = (AdamW(groups_of(each), (0.9, 0.95), 1e-8, 0.5) for each in (whole, parts))
    master = torch.cat([*(p.detach().flatten() for p in parts), torch.full((4,), 7.0)])
    starts = [0, 15, 22]
    flat.merge()
    assert len(flat.param_groups) == 1
    assert len(flat.rules) == 2
    halves = [Stretch(parts[0], master, 0, 8), Stretch(parts[0], master, 8, 7)]
    flat.attach([*halves, *(Stretch(p, master, starts[n], p.numel()) for n, p in enumerate(parts) if n)])
    for step in range(4):
        drawn = gradients(step)
        for parameter, gradient in zip(whole, drawn, strict=True):
            parameter.grad = gradient.clone()
        master.grad = torch.cat([*(gradient.flatten() for gradient in drawn), torch.full((4,), torch.nan)])
        by_parameter.step()
        flat.step()
    torch.testing.assert_close(master[:30], torch.cat([p.detach().flatten() for p in whole]))
    assert master[30:].eq(7.0).all()
    assert float(flat.state[master]["step"]) == 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    with_it, without = parameters(), parameters()
    optimizers = [AdamW(groups_of(each), (0.9, 0.95), 1e-8, 1.0) for each in (with_it, without)]
    for step in range(4):
        for each, optimizer in zip((with_it, without), optimizers, strict=True):
            for parameter, gradient in zip(each, gradients(step), strict=True):
                parameter.grad = gradient.clone()
            if step == 2 and each is without:
                continue
            if step == 2:
                each[1].grad[3] = bad
            optimizer.step()
        if step == 2:
            assert not optimizers[0].norm.isfinite()
    for one, other in zip(with_it, without, strict=True):
        assert torch.equal(one, other)
    for parameter, other in zip(with_it, without, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizers[0].state[parameter][name], optimizers[1].state[other][name])


def test_slow_averages_move_as_one_by_one_and_not_where_a_step_was_left_out() -> None:
    torch.manual_seed(0)
    slow, fast = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    fast[1].running_mean.fill_(2.0)
    expected = {
        name: p.detach().clone().lerp_(dict(fast.named_parameters())[name].detach(), 0.1)
        for name, p in slow.named_parameters()
    }
    before = {name: value.clone() for name, value in slow.state_dict().items()}
    update_ema([(slow, fast)], 0.1, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in slow.state_dict().items())
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(slow.state_dict())
    update_ema([(slow, fast)], 0.1)
    update_ema([(other, fast)], 0.1, torch.tensor(True))
    for name, parameter in slow.named_parameters():
        assert torch.equal(parameter, expected[name])
    assert all(torch.equal(value, slow.state_dict()[name]) for name, value in other.state_dict().items())
    assert slow[1].running_mean.tolist() == pytest.approx([0.2] * 4)
