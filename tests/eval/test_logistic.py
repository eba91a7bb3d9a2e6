"""Logistic regression against scikit-learn's."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from eval.probes.logistic import COARSE_GRID, FULL_GRID, fit, logistic_probe


@pytest.fixture(scope="module")
def blobs():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 10, generator=generator)

    def draw(num):
        labels = torch.randint(6, (num,), generator=generator)
        return centres[labels] + 1.2 * torch.randn(num, 10, generator=generator) + 5.0, labels  # far from centred

    return (*draw(400), *draw(200))


@pytest.mark.parametrize("strength", [1e-4, 1e-1, 10.0])
def test_same_minimum_as_scikit_learn(blobs, strength):
    train, labels, _, _ = blobs
    weight, bias = fit(train.double(), labels, strength, 6, max_iterations=2000, tolerance=1e-9)
    theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=5000).fit(train.double().numpy(), labels.numpy())
    torch.testing.assert_close(weight, torch.from_numpy(theirs.coef_), rtol=1e-2, atol=2e-4)
    logits, wanted = train.double() @ weight.T + bias, theirs.predict_log_proba(train.double().numpy())
    torch.testing.assert_close(logits.log_softmax(1), torch.from_numpy(wanted), rtol=1e-2, atol=2e-3)


def test_a_warm_start_changes_nothing(blobs):
    train, labels, _, _ = blobs
    cold = fit(train.double(), labels, 1.0, 6, max_iterations=2000, tolerance=1e-9)
    start = fit(train.double(), labels, 0.01, 6)
    warm = fit(train.double(), labels, 1.0, 6, start=start, max_iterations=2000, tolerance=1e-9)
    torch.testing.assert_close(warm[0], cold[0], rtol=1e-3, atol=1e-4)


def test_probe_chooses_and_is_as_good_as_scikit_learn(blobs):
    scores = logistic_probe(*blobs, num_classes=6)
    train, labels, val, val_labels = blobs
    theirs = LogisticRegression(C=scores.chosen, max_iter=2000).fit(train.numpy(), labels.numpy())
    assert scores.top1 == pytest.approx(theirs.score(val.numpy(), val_labels.numpy()), abs=0.011)
    assert scores.top5 >= scores.top1
    assert scores.grid == COARSE_GRID
    assert not scores.at_grid_edge
    assert scores == logistic_probe(*blobs, num_classes=6)


def test_grids():
    assert len(FULL_GRID) == 45
    assert FULL_GRID[0] == pytest.approx(1e-6)
    assert FULL_GRID[-1] == pytest.approx(1e5)
    assert set(COARSE_GRID) < set(FULL_GRID)
    assert len(COARSE_GRID) == 12


def test_an_empty_grid_is_refused(blobs):
    with pytest.raises(ValueError, match="grid is empty"):
        logistic_probe(*blobs, num_classes=6, grid=())
