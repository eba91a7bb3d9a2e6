"""What a classifier's scores say beside its accuracy."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics

from eval.measures import against_the_rest, class_measures, measure_columns, measure_notes, ranking_draws, ranks


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


def test_scores_that_are_not_finite_are_wrong() -> None:
    logits = torch.full((3, 4), torch.nan)
    logits[1] = torch.tensor([0.0, 1.0, torch.inf, 0.0])
    assert ranks(logits, torch.tensor([0, 2, 3])).tolist() == [4, 4, 4]


def test_a_head_that_diverged_has_no_image_right() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    logits = 9 * torch.eye(3)[labels]
    logits[0] = torch.nan
    measures = class_measures(logits, labels, labels, tuple("abc"))
    assert measures["not_finite"] == 1
    assert [row[place] for place, row in enumerate(measures["confusion"])] == [1, 1, 1]
    assert "the scores of 1 val images are not finite" in measure_notes("linear", measures)[0]
    assert class_measures(logits * torch.nan, labels, labels)["balanced_accuracy"]["value"] == 0


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_auroc_does_not_depend_on_how_sure_the_scores_are(scale: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(500, generator=generator) < 0.5).long()
    score = torch.randn(500, generator=generator) + 1.5 * (2 * labels - 1)
    found = class_measures(scale * torch.stack([-score / 2, score / 2], dim=1), labels, labels)
    assert found["auroc"]["value"] == pytest.approx(metrics.roc_auc_score(labels, score), abs=1e-5)


def test_scores_against_the_rest_order_as_softmax_does() -> None:
    logits, _ = scores(50, 5)
    share = logits.double().softmax(dim=1)
    assert torch.allclose(against_the_rest(logits), (share / (1 - share)).log())


def test_val_of_one_class_has_no_auroc() -> None:
    logits, labels = scores(20, 3)
    assert "auroc" not in class_measures(logits, torch.ones_like(labels), labels)


def test_what_is_reached_blindly_is_what_the_most_frequent_class_reaches() -> None:
    logits, _ = scores(60, 3)
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    measures = class_measures(logits, labels, torch.tensor([0] * 10 + [1] * 30 + [2] * 9))
    assert measures["blind"]["balanced_accuracy"] == pytest.approx(1 / 3)
    expected = metrics.f1_score(labels, torch.ones(60), average="macro", zero_division=0)
    assert measures["blind"]["macro_f1"] == pytest.approx(expected)
    assert {c.name: c.chance for c in measure_columns("linear", measures)} == {
        "linear_balanced_accuracy": measures["blind"]["balanced_accuracy"],
        "linear_macro_f1": measures["blind"]["macro_f1"],
        "linear_auroc": 0.5,
    }
