"""Rank correlations against SciPy's, and what the label-free numbers of checkpoints are said to prefer."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from eval.agreement import preferences, spearman, without_labels


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_scipys(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 6, 12).tolist(), (rng.normal(size=12) + np.arange(12) / 5).tolist()  # with ties
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)


def test_no_correlation():
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="2 and 3 numbers"):
        spearman([1, 2], [1, 2, 3])


def test_each_number_has_its_own_best():
    steps, knn = [10, 20, 30, 40], [0.1, 0.2, 0.4, 0.3]
    numbers = {
        "RankMe": [5.0, 9.0, 30.0, 20.0],
        "alpha-ReQ": [2.0, 0.9, 1.3, 1.4],
        "uniformity": [-1.0, -2.0, -3.0, -2.5],
        "LiDAR": [None, None, 3.0, None],
    }
    preferred, correlation = preferences(steps, numbers, knn)
    assert preferred == {"RankMe": 30, "alpha-ReQ": 20, "uniformity": 30}
    assert correlation["RankMe"] == correlation["uniformity"] == 1
    assert correlation["alpha-ReQ"] == pytest.approx(spearmanr([-1, -0.1, -0.3, -0.4], knn).statistic)


def result(step, rankme, uniformity, knn=None):
    score = None if knn is None else {"mean": {"20": {"top1": knn}}}
    return {
        "target": {"step": step},
        "columns": [{"probe": "knn", "headline": True, "paths": [["mean", "20"]]}],
        "rows": {
            "pretrained": {
                "label_free": {"rankme": {"value": rankme}, "uniformity": {"value": uniformity}, "alpha_req": None},
                **({} if score is None else {"knn": score}),
            }
        },
    }


def test_lines():
    found = without_labels([result(1000, 3.0, -1.0), result(2000, 9.0, -2.0), result(3000, 8.0, -3.0)])
    assert found == ["without labels they prefer step 2,000 (RankMe), step 3,000 (uniformity)"]
    known = [result(step, step, -step, knn / 100) for step, knn in enumerate((20, 30, 25, 40, 50, 45))]
    lines = without_labels(known)
    assert lines[0] == "without labels they prefer step 5 (RankMe, uniformity)"
    assert lines[1] == (
        "rank correlation with k-NN over 6 checkpoints: RankMe +0.89, uniformity +0.89; "
        "chance alone reaches 0.89 either way in one of twenty cases"
    )
    assert "says little" in without_labels(known[:4])[1]
    assert without_labels(known[:1]) == []
