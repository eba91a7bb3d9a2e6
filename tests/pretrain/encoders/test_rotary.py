"""Rotary positions, against the angle of each number written out, and what is drawn of them."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipelines.rng import Purpose
from pretrain.encoders import rotary
from pretrain.encoders.drop_path import drawn, uniforms_of_the_step
from pretrain.encoders.position_settings import RotaryPositions, check_rotary

CPU = torch.device("cpu")


def slowly(head: list[float], place: tuple[float, float], base: float) -> list[float]:
    """One head of one token, turned number by number."""
    quarter = len(head) // 4
    out = list(head)
    for number in range(2 * quarter):
        period = base ** (2 * (number % quarter) / (len(head) / 2))
        angle = 2 * math.pi * place[number // quarter] / period
        first, second = head[number], head[number + 2 * quarter]
        out[number] = first * math.cos(angle) - second * math.sin(angle)
        out[number + 2 * quarter] = second * math.cos(angle) + first * math.sin(angle)
    return out


def test_every_number_is_turned_by_the_angle_of_its_place() -> None:
    grid, width, prefix = (2, 3), 8, 2
    heads = torch.randn(1, prefix + 6, 2, width, generator=torch.Generator().manual_seed(0))
    turn = rotary.chosen(rotary.turn_of(RotaryPositions(), grid, width, prefix, CPU), None, prefix)
    found = rotary.turned(heads, turn)
    assert torch.equal(found[:, :prefix], heads[:, :prefix])
    for row in range(2):
        for column in range(3):
            place = (2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1)
            for head in range(2):
                number = prefix + row * 3 + column
                expected = slowly(heads[0, number, head].tolist(), place, 100.0)
                torch.testing.assert_close(found[0, number, head], torch.tensor(expected))


@pytest.mark.parametrize(("normalise", "sides"), [("separate", (2, 4)), ("max", (4, 4)), ("min", (2, 2))])
def test_coordinates_are_of_the_middles_of_patches(normalise: str, sides: tuple[int, int]) -> None:
    places = rotary.coordinates(RotaryPositions(normalise=normalise), (2, 4))  # type: ignore[arg-type]
    expected = [[2 * (r + 0.5) / sides[0] - 1, 2 * (c + 0.5) / sides[1] - 1] for r in range(2) for c in range(4)]
    torch.testing.assert_close(places, torch.tensor(expected))


def test_periods_lie_between_the_least_and_the_largest() -> None:
    found = rotary.periods(RotaryPositions(base=None, periods=(0.1, 8.0)), 16)
    torch.testing.assert_close(found, torch.tensor([0.1 * 80 ** (i / 3) for i in range(4)]))
    assert rotary.periods(RotaryPositions(dtype="bf16"), 16).dtype == torch.bfloat16


def turns(rope: RotaryPositions, units: Tensor | None = None, training: bool = True) -> list[Tensor]:
    return rotary.turns_of(rope, (2, 3), units, 8, 1, 3, CPU, training)


def test_units_that_are_left_keep_their_turns() -> None:
    units = torch.tensor([[0, 4], [2, 5]])
    whole, few = turns(RotaryPositions())[0], turns(RotaryPositions(), units)[0]
    for image in range(2):
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), units[image] + 1])
        assert torch.equal(few[:, image], whole[:, 0, kept])


def test_coordinates_are_drawn_anew_for_each_block_size_and_step() -> None:
    rope = RotaryPositions(shift=0.1, jitter=1.5, rescale=2.0)
    still = turns(RotaryPositions())[0]
    assert torch.equal(turns(rope)[0], still)  # outside of a step nothing is drawn
    seen: list[Tensor] = []
    for step, rows in ((3, torch.arange(2)), (4, torch.arange(2)), (3, torch.arange(2, 7))):
        with drawn(1, step, rows):
            assert torch.equal(turns(rope, training=False)[0], still)
            seen += [*turns(rope), *turns(rope)]
    for one in range(12):
        for other in range(one):
            assert not torch.equal(seen[one], seen[other])
    assert all(torch.equal(*pair) for pair in zip(seen[:6], seen[12:], strict=True))  # whichever images share a rank


def test_what_is_drawn_is_shifted_then_stretched_within_its_bounds() -> None:
    rope = RotaryPositions(shift=0.1, jitter=1.5, rescale=2.0)
    with drawn(0, 0, torch.arange(1)):
        uniforms = uniforms_of_the_step(Purpose.COORDINATES, 500, 5)
    assert uniforms is not None
    moved, factors = rotary.drawn_changes(rope, uniforms)
    assert 0.09 < abs(moved).max() <= 0.1
    assert 2.5 < factors.max() <= 3.0
    assert 1 / 3 <= factors.min() < 0.4
    alike = rotary.drawn_changes(RotaryPositions(rescale=2.0), uniforms)[1]
    assert (alike[:, 0] == alike[:, 1]).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="base or periods"):
        RotaryPositions(base=None)
    with pytest.raises(ValidationError, match="base or periods"):
        RotaryPositions(periods=(1.0, 2.0))
    with pytest.raises(ValueError, match="6 wide"):
        check_rotary(12, 2)
