"""Weighted statistics against scikit-learn's on the images repeated as often as they weigh."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from torch import Tensor

from eval import statistics

NUM, CLASSES = 200, 4


def draws() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes, predictions, scores with ties, and three weightings."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (NUM,), generator=generator)
    others = torch.randint(CLASSES, (NUM,), generator=generator)
    predicted = torch.where(torch.rand(NUM, generator=generator) < 0.5, targets, others)
    scores = torch.rand(NUM, CLASSES, generator=generator).mul(20).round() / 20
    scores[torch.arange(NUM), targets] += 0.2
    return targets, predicted, scores, torch.randint(3, (3, NUM), generator=generator).float()


TARGETS, PREDICTED, SCORES, WEIGHTS = draws()
ONE_HOT = F.one_hot(TARGETS, CLASSES)
CASES: dict[str, tuple[Tensor, Tensor, Callable[[np.ndarray], float]]] = {
    "mean": (
        (PREDICTED == TARGETS).float(),
        TARGETS,
        lambda rows: metrics.accuracy_score(TARGETS[rows], PREDICTED[rows]),
    ),
    "balanced_accuracy": (
        PREDICTED,
        TARGETS,
        lambda rows: metrics.balanced_accuracy_score(TARGETS[rows], PREDICTED[rows]),
    ),
    "macro_f1": (
        PREDICTED,
        TARGETS,
        lambda rows: metrics.f1_score(TARGETS[rows], PREDICTED[rows], average="macro"),
    ),
    "quadratic_kappa": (
        PREDICTED,
        TARGETS,
        lambda rows: metrics.cohen_kappa_score(TARGETS[rows], PREDICTED[rows], weights="quadratic"),
    ),
    "r2": (PREDICTED.float(), TARGETS.float(), lambda rows: metrics.r2_score(TARGETS[rows], PREDICTED[rows])),
    "mean_average_precision": (
        SCORES,
        ONE_HOT,
        lambda rows: metrics.average_precision_score(ONE_HOT[rows], SCORES[rows], average="macro"),
    ),
    "auroc": (SCORES, TARGETS, lambda rows: metrics.roc_auc_score(ONE_HOT[rows], SCORES[rows], average="macro")),
}


@pytest.mark.parametrize("name", CASES)
def test_of_weighted_images_as_scikit_learn_of_repeated_ones(name: str) -> None:
    values, targets, expected = CASES[name]
    found = statistics.STATISTICS[name](values, targets, WEIGHTS)
    for weighting, number in zip(WEIGHTS, found.tolist(), strict=True):
        rows = np.repeat(np.arange(NUM), weighting.int().numpy())
        assert number == pytest.approx(expected(rows), abs=1e-5)


def test_intersections_over_unions_are_summed_over_images_before_they_are_divided() -> None:
    counts = torch.tensor([[[2, 4], [0, 0], [1, 3]], [[1, 1], [0, 2], [0, 3]]])  # (images, classes, both)
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    expected = [(3 / 5 + 0 + 1 / 6) / 3, (2 / 4 + 1 / 3) / 2, (5 / 9 + 0 + 2 / 9) / 3]
    assert statistics.mean_iou(counts, torch.empty(0), weights).tolist() == pytest.approx(expected)


def test_a_share_of_pixels_is_of_all_pixels() -> None:
    counts = torch.tensor([[1, 2], [30, 100]])
    assert statistics.ratio(counts, torch.empty(0), torch.ones(1, 2)).tolist() == pytest.approx([31 / 102])


def test_classes_that_a_draw_lacks_are_left_out_of_it() -> None:
    targets = torch.tensor([0, 0, 1, 2])
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert statistics.balanced_accuracy(torch.tensor([0, 1, 1, 0]), targets, weights).tolist() == [0.75]
    scores = F.one_hot(targets, 3).float()
    assert statistics.auroc(scores, targets, weights).tolist() == [1.0]
    assert statistics.mean_average_precision(scores, F.one_hot(targets, 3), weights).tolist() == [1.0]


def test_grades_further_off_cost_more() -> None:
    targets, weights = torch.tensor([0, 1, 2, 3]), torch.ones(1, 4)
    near, far = torch.tensor([1, 1, 2, 3]), torch.tensor([3, 1, 2, 3])
    assert statistics.quadratic_kappa(near, targets, weights) > statistics.quadratic_kappa(far, targets, weights)
    assert statistics.quadratic_kappa(torch.ones(4).long(), torch.ones(4).long(), weights).tolist() == [1.0]


@pytest.mark.parametrize("offset", [0.0, 0.1, 1990.3])
def test_r2_of_one_target_is_not_defined_and_does_not_explode(offset: float) -> None:
    targets = torch.tensor([1.0, 1.0, 2.0]) + offset
    weights = torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    constant, whole = statistics.r2(targets + 0.1, targets, weights).tolist()
    assert np.isnan(constant)
    assert whole == pytest.approx(1 - 3 * 0.01 / (2 / 3), abs=1e-3)
    numbers, away = torch.ones(3).double(), targets.double() - targets.mean()
    pooled = torch.stack([numbers, away, away.square(), torch.full((3,), 0.01)], dim=1)
    constant, whole = statistics.pooled_r2(pooled, torch.empty(0), weights).tolist()
    assert np.isnan(constant)
    assert whole == pytest.approx(1 - 3 * 0.01 / (2 / 3), abs=1e-3)


def test_a_draw_without_anything_that_a_number_is_of_is_not_defined() -> None:
    weights = torch.tensor([[1.0, 1.0, 0.0]])
    scores, targets = torch.tensor([[0.1, 0.3], [0.2, 0.1], [0.4, 0.2]]), torch.tensor([[0, 0], [0, 0], [1, 0]])
    assert statistics.mean_average_precision(scores, targets, weights).isnan().all()
    assert statistics.auroc(scores, targets, weights).isnan().all()
    counts = torch.tensor([[[0, 0]], [[0, 0]], [[1, 2]]])
    assert statistics.mean_iou(counts, torch.empty(0), weights).isnan().all()
    assert statistics.quadratic_kappa(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.zeros(1, 2)).isnan().all()


@pytest.mark.parametrize("positive", [0, 1, 3, 6])
def test_blind_average_precision_is_the_mean_of_all_orders(positive: int) -> None:
    targets = torch.tensor([1] * positive + [0] * (6 - positive))
    orders = torch.tensor(list(itertools.permutations(range(6)))).float()
    found = [statistics.average_precision(order, targets, torch.ones(1, 6))[0] for order in orders]
    assert statistics.blind_average_precision(6, torch.tensor(positive)).item() == pytest.approx(
        float(torch.cat(found).mean()), abs=1e-6
    )
