"""Numbers with errors of a bootstrap, and the outcomes behind them on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.outcomes import (
    Outcome,
    bootstrap,
    read_outcomes,
    scored,
    undefined_draws,
    weightings,
    without_outcomes,
    write_outcomes,
)


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


def test_draws_of_which_a_number_is_not_defined_are_left_out_and_counted() -> None:
    pixels = Outcome("ratio", torch.tensor([[0.0, 0.0], [80.0, 100.0], [70.0, 100.0]]))  # of one nothing is known
    score = scored(pixels, groups=torch.arange(3))
    assert 0 < score["undefined_draws"] < 100  # 1 in 27
    assert score["value"] == pytest.approx(0.75)
    assert 0.02 < score["standard_error"] < 0.06
    assert score["interval"] == pytest.approx([0.7, 0.8])
    json.dumps({**score, "outcome": None}, allow_nan=False)
    assert list(undefined_draws({"segmentation": {"pixels": score}})) == [
        ("segmentation/pixels", score["undefined_draws"])
    ]
    assert "undefined_draws" not in scored(right(0.5, 20))
    with pytest.raises(ValueError, match="ratio of these 2 val images is nan: they do not have what it is of"):
        scored(Outcome("ratio", torch.zeros(2, 2)))


def test_r2_of_patients_of_one_number_each_has_an_error_of_its_own_size() -> None:
    groups = torch.arange(5).repeat_interleave(40)
    targets = torch.tensor([30.1, 45.2, 52.3, 61.4, 70.5])[groups]
    predicted = targets + 5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    score = scored(Outcome("r2", predicted, targets), groups=groups)
    assert score["undefined_draws"] <= 10  # one patient five times: 1 in 625
    assert 0.8 < score["value"] < 0.95
    assert score["standard_error"] < 1
    assert score["interval"][0] > -1


def test_an_interval_of_few_draws_is_of_their_deviation() -> None:
    score = scored(right(0.9, 100), draws=50)
    low, high = score["interval"]
    reach = 1.959964 * score["standard_error"]
    assert (low, high) == pytest.approx((score["value"] - reach, score["value"] + reach))
    scores = torch.linspace(0, 1, 20)[:, None]
    assert scored(Outcome("auroc", scores, scores.round()), draws=50)["interval"] == [1, 1]
