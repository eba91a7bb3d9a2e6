"""What a classifier's scores say beside its accuracy."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics

from eval.measures import class_measures, measure_notes, ranking_draws, ranks


def scores(num: int = 300, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (num,), generator=generator)
    logits = torch.randn(num, classes, generator=generator)
    logits[torch.arange(num), labels] += 1.0
    return logits, labels


def test_measures_are_scikit_learns() -> None:
    logits, labels = scores()
    found = class_measures(logits, labels, labels)
    predicted, shares = logits.argmax(1), logits.softmax(1)
    assert found["balanced_accuracy"]["value"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"]["value"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    theirs = metrics.roc_auc_score(labels, shares.double() / shares.double().sum(1, keepdim=True), multi_class="ovr")
    assert found["auroc"]["value"] == pytest.approx(theirs, abs=1e-5)
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()
    for name in ("balanced_accuracy", "macro_f1", "auroc"):
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high
        assert 0 < found[name]["standard_error"] < 0.05


def test_reliability_counts_every_image_once() -> None:
    logits, labels = scores()
    bins = class_measures(logits, labels, labels)["reliability"]
    assert sum(each["count"] for each in bins) == len(labels)
    share = sum(each["accuracy"] * each["count"] for each in bins) / len(labels)
    assert share == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert [each["confidence"] for each in bins] == sorted(each["confidence"] for each in bins)


def test_rare_classes_are_named_with_their_recall() -> None:
    logits, labels = torch.eye(3)[[0, 1, 1, 0]], torch.tensor([0, 1, 1, 1])
    measures = class_measures(logits, labels, torch.tensor([0] * 30 + [1] * 4 + [2] * 2), ("cat", "dog", "eel"))
    assert measures["rare"] == [
        {"class": "dog", "train": 4, "recall": pytest.approx(2 / 3)},
        {"class": "eel", "train": 2, "recall": None},
    ]
    (line,) = measure_notes("linear", measures)
    assert line == "linear: rare classes: eel (2 to learn from, recall -), dog (4 to learn from, recall 67)"


def test_of_equal_scores_the_lower_class_wins() -> None:
    assert ranks(torch.zeros(3, 3), torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


def test_many_classes_get_no_confusion_matrix_and_fewer_draws() -> None:
    logits, labels = scores(200, 150)
    assert "confusion" not in class_measures(logits, labels, labels)
    assert ranking_draws(10_000, 10) == 1000
    assert ranking_draws(50_000, 1000) == 50
