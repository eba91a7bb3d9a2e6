"""Numbers with errors of a bootstrap, and the outcomes behind them on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.outcomes import Outcome, bootstrap, read_outcomes, scored, weightings, without_outcomes, write_outcomes


def right(share: float, num: int) -> Outcome:
    return Outcome("mean", (torch.arange(num) < share * num).float())


def test_the_bootstrap_of_a_share_has_the_binomial_error() -> None:
    score = scored(right(0.8, 400))
    assert score["value"] == pytest.approx(0.8)
    assert score["standard_error"] == pytest.approx((0.8 * 0.2 / 400) ** 0.5, rel=0.1)
    low, high = score["interval"]
    assert low == pytest.approx(0.8 - 1.96 * 0.02, abs=0.006)
    assert high == pytest.approx(0.8 + 1.96 * 0.02, abs=0.006)


def test_images_of_one_group_are_drawn_together() -> None:
    outcome, groups = right(0.5, 400), torch.arange(400) // 40  # right or wrong by groups
    for weights in weightings(400, 0, groups, draws=20):
        assert (weights.unflatten(1, (10, 40)) == weights[:, ::40, None]).all()
        assert (weights[:, ::40].sum(dim=1) == 10).all()
    by_group, by_image = (scored(outcome, groups=g)["standard_error"] for g in (groups, None))
    assert by_group == pytest.approx((0.25 / 10) ** 0.5, rel=0.15)
    assert by_group > 5 * by_image


def test_draws_are_of_the_seed_alone() -> None:
    outcome = right(0.3, 50)
    assert bootstrap(outcome, 1).equal(bootstrap(outcome, 1))
    assert not bootstrap(outcome, 1).equal(bootstrap(outcome, 2))


def test_a_statistic_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="statistic is 'median'; there are mean, ratio"):
        Outcome("median", torch.zeros(3))


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="no image to compute mean of"):
        scored(Outcome("mean", torch.zeros(0)))


def test_outcomes_leave_the_result_and_come_back_from_their_file(tmp_path: Path) -> None:
    result = {"knn": {"class": {"20": scored(right(0.5, 8))}}, "other": [1, {"value": 2.0}]}
    found: dict[str, Outcome] = {}
    plain = without_outcomes(result, found)
    assert set(found) == {"knn/class/20"}
    assert "outcome" not in plain["knn"]["class"]["20"]
    assert plain["knn"]["class"]["20"]["value"] == 0.5
    assert plain["other"] == [1, {"value": 2.0}]
    ids, groups = torch.arange(8) * 3, torch.arange(8) // 2
    write_outcomes(tmp_path / "probe.npz", found, ids, groups)
    back, back_ids, back_groups = read_outcomes(tmp_path / "probe.npz")
    assert back["knn/class/20"].values.equal(found["knn/class/20"].values)
    assert back["knn/class/20"].number() == 0.5
    assert back_ids.equal(ids)
    assert back_groups is not None
    assert back_groups.equal(groups)
    write_outcomes(tmp_path / "probe.npz", found, ids, None)
    assert read_outcomes(tmp_path / "probe.npz")[2] is None
