"""Probes of labels that are no single class, and ridge regression, against scikit-learn's and on planted features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from eval import registry
from eval.base import FeatureSet, LabelKind, Store
from eval.probes import multilabel, regression
from eval.protocol import Protocol, described, score
from eval.report import score_of
from eval.ridge import ridge_probe, strata

DIM = 6


def features(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, DIM, generator=torch.Generator().manual_seed(seed)) + 5


def store_of(kind: LabelKind, noise: float = 0.3) -> Store:
    """The label is a function of the first features, but for noise."""

    def split(num: int, seed: int) -> FeatureSet:
        values = features(num, seed)
        value = values[:, 0] - 5 + noise * torch.randn(num, generator=torch.Generator().manual_seed(seed + 100))
        labels = {
            "number": 10 + 3 * value,
            "grade": (value * 1.2 + 1.5).round().clamp(0, 3).long(),
            "class": (value > 0).long() + (value > 0.8).long(),
            "several": torch.stack([(value > 0), (values[:, 1] > 5), (values[:, 2] > 6)], dim=1).float(),
        }[kind]
        inputs = {"class": values, "noise": torch.randn(num, 3, generator=torch.Generator().manual_seed(seed + 7))}
        return FeatureSet(inputs, "class", labels, torch.arange(num), torch.arange(num) + 1000 * seed)

    num_classes = {"number": 0, "grade": 4, "class": 3, "several": 3}[kind]
    return Store(split(240, 0), split(120, 1), num_classes, "class", kind=kind, class_names=tuple("abcd"[:num_classes]))


@pytest.mark.parametrize("kind", ["class", "several", "number", "grade"])
def test_every_probe_of_a_kind_keeps_the_seams_promises(kind: LabelKind) -> None:
    specs = [spec for spec in map(registry.load, registry.built_in()) if spec.needs == "pooled" and spec.takes(kind)]
    assert any(spec.always for spec in specs)
    protocol = Protocol.of([spec.name for spec in specs], (0, 1), {"epochs": 2}, kind=kind)
    scores, outcomes = score(store_of(kind), protocol)
    columns, notes = described(scores, protocol)
    assert {column["probe"] for column in columns} == {spec.name for spec in specs}
    assert any(column["headline"] for column in columns)
    assert outcomes
    assert notes
    for column in columns:
        found = score_of(scores, column)
        assert found is not None, column
        assert found["interval"][0] <= found[column["key"]] <= found["interval"][1]
        assert found["standard_error"] >= 0


def test_ridge_is_scikit_learns() -> None:
    train, val = features(80, 0), features(40, 1)
    targets = torch.stack([train[:, 0] - train[:, 1], train[:, 2]], dim=1) + 0.1 * features(80, 2)[:, :2]
    strength = 0.01
    found = ridge_probe(
        {"a": train}, targets, {"a": val}, by=strata(targets[:, 0]), good=lambda p, t: 0.0, strengths=(strength,)
    )
    unit = float(train.double().var(dim=0, correction=0).mean() * len(train))
    theirs = Ridge(alpha=strength * unit).fit(train.double().numpy(), targets.double().numpy())
    assert np.abs(theirs.predict(val.double().numpy()) - found.predicted.numpy()).max() < 1e-4


def test_ridge_chooses_the_input_that_says_something() -> None:
    store = store_of("number")
    result = regression.run(store, regression.RegressionSettings())
    assert result["ridge"]["input"] == "class"
    assert result["ridge"]["r2"]["value"] > 0.8
    assert result["ridge"]["mean_absolute_error"]["value"] < 0.5 * result["blind"]
    assert 0 < result["knn"]["r2"]["value"] < result["ridge"]["r2"]["value"]


def test_no_group_is_in_both_parts_of_train() -> None:
    store = store_of("number")
    groups = torch.arange(240) // 24
    seen: list[set[int]] = []

    def good(predicted: torch.Tensor, targets: torch.Tensor) -> float:
        places = [int((store.train.labels == value).nonzero()[0]) for value in targets[:, 0]]
        seen.append(set(groups[places].tolist()))
        assert len(places) == 24 * len(seen[-1])
        return 0.0

    ridge_probe(
        store.train.inputs, store.train.labels[:, None], store.val.inputs, by=strata(store.train.labels), good=good,
        groups=groups,
    )  # fmt: skip
    assert seen
    assert all(each == seen[0] for each in seen)


def test_the_error_is_of_groups_where_there_are_any() -> None:
    store = store_of("number", noise=2.0)
    groups = torch.arange(120) // 60
    settings = regression.RegressionSettings()
    alone = regression.run(store, settings)["ridge"]["r2"]["standard_error"]
    grouped = regression.run(replace(store, val=replace(store.val, groups=groups)), settings)
    assert grouped["ridge"]["r2"]["standard_error"] != alone


def test_one_logistic_regression_a_class_is_scikit_learns() -> None:
    store = store_of("several")
    train, labels = store.train.inputs["class"], store.train.labels
    solution = multilabel.fit(train, labels, 0.1, None, iterations=500)
    logits = multilabel.apply(solution, store.val.inputs["class"])
    mean, deviation = train.mean(0), (train.var(0, correction=0) + 1e-6).sqrt()
    for place in range(3):
        theirs = LogisticRegression(C=0.1, tol=1e-8).fit(((train - mean) / deviation).numpy(), labels[:, place].numpy())
        expected = theirs.decision_function(((store.val.inputs["class"] - mean) / deviation).numpy())
        assert np.abs(expected - logits[:, place].numpy()).max() < 0.02


def test_classes_are_told_one_by_one() -> None:
    result = multilabel.run(store_of("several"), multilabel.MultilabelSettings())
    assert set(result["per_class"]) == {"a", "b", "c"}
    assert result["logistic"]["value"] > result["blind"] + 0.3
    assert np.mean(list(result["per_class"].values())) == pytest.approx(result["logistic"]["value"], abs=1e-5)
