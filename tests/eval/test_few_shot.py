"""Few labels: against scikit-learn and against a slow form of each draw."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from eval.base import FeatureSet, Store
from eval.probes.few_shot import SPEC, FewShotSettings, few_shot_right, fit, orders, prepared, scored_over_draws

SETTINGS = FewShotSettings(shots=(1, 5), draws=3)


def features_of(labels, dim=12, seed=0, groups=None):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(7, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.tensor(labels)
    values = centres[labels] + torch.randn(len(labels), dim, generator=generator) + 3
    number = torch.arange(len(labels))
    return FeatureSet({"class": values}, "class", labels, number, number, groups)


@pytest.fixture(scope="module")
def store():
    return Store(features_of([0, 1, 2, 4] * 12 + [5] * 3), features_of([0, 1, 2, 3, 4, 5] * 10, seed=1), 7, "class")


@pytest.mark.parametrize("dim", [6, 60])  # more images than dimensions, and fewer
def test_the_logistic_is_scikit_learns(dim):
    train = F.normalize(features_of([0, 1, 2] * 5, dim).inputs["class"]).double()
    draws = torch.stack([train, train.flip(0) * 1.1])
    labels = torch.tensor([0, 1, 2] * 5)
    weight, bias = fit(draws, labels, 3, 1e-2, iterations=1000)
    for place, features in enumerate(draws):
        theirs = LogisticRegression(C=1 / (1e-2 * 15), tol=1e-9, max_iter=5000).fit(features.numpy(), labels.numpy())
        logits = features @ weight[place].T + bias[place]
        wanted = torch.from_numpy(theirs.predict_log_proba(features.numpy()))
        torch.testing.assert_close(logits.log_softmax(1), wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(weight[place], torch.from_numpy(theirs.coef_), rtol=1e-2, atol=5e-3)


def test_each_draw_is_what_it_is_alone(store):
    train, val = prepared(store.train.inputs["class"], store.val.inputs["class"])
    labels, val_labels = store.train.labels, store.val.labels
    found = dict(few_shot_right(train, labels, val, val_labels, settings=SETTINGS, seed=4))
    of_class = dict(zip([0, 1, 2, 4, 5], orders(labels, 3, 4), strict=True))
    for draw in range(3):
        rows = {label: order[draw, :5] for label, order in of_class.items()}
        assert all((labels[each] == label).all() for label, each in rows.items())
        means = {label: F.normalize(train[each].mean(dim=0), dim=0) for label, each in rows.items()}
        picked = torch.cat(list(rows.values()))
        model = LogisticRegression(C=1 / (1e-3 * len(picked)), tol=1e-8, max_iter=5000)
        model.fit(train[picked].numpy(), labels[picked].numpy())
        nearest = [max(means, key=lambda label, one=one, of=means: float(one @ of[label])) for one in val]
        assert found[5]["mean"][draw].tolist() == [a == int(b) for a, b in zip(nearest, val_labels, strict=True)]
        theirs = torch.from_numpy(model.predict(val.numpy())) == val_labels
        assert (found[5]["logistic"][draw] != theirs).sum() <= 1


def test_draws_are_of_train_and_nested(store):
    labels = store.train.labels
    first, again, other = (orders(labels, 3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    for order in first:
        assert torch.equal(order.sort(dim=1).values, order[:1].sort(dim=1).values.expand_as(order))


def test_memory_bound_changes_nothing(store, monkeypatch):
    whole = SPEC.run(store, SETTINGS)
    monkeypatch.setattr("eval.probes.few_shot.MOST_DRAWN", 1)
    parts = SPEC.run(store, SETTINGS)
    assert whole["mean"]["5"]["top1"] == parts["mean"]["5"]["top1"]
    assert whole["logistic"]["5"]["top1"] == pytest.approx(parts["logistic"]["5"]["top1"], abs=0.02)


def test_run_says_what_is_missing(store):
    result = SPEC.run(store, SETTINGS)
    assert result["small_classes"] == {"1": 0, "5": 1}
    assert result["mean"]["1"]["top1"] < result["mean"]["5"]["top1"] <= 50 / 60  # class 3 can't be known
    assert any("1 of 5 classes have fewer than 5" in line for line in SPEC.notes(result, SETTINGS))
    shown = SPEC.columns(result, "class")
    assert [c.name for c in shown if not c.more] == ["few_shot_5", "few_shot_5_logistic"]
    assert all(result[method][shots] for c in shown for method, shots in c.paths)


def test_the_error_counts_draws_and_images():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(10, 400, generator=generator) < 0.5
    alike = right[:1].expand(10, -1)
    binomial = scored_over_draws(alike)
    assert binomial["standard_error"] == pytest.approx(0.5 / 400**0.5, rel=0.02)
    spread = torch.linspace(0.1, 0.9, 10)[:, None] > torch.rand(10, 400, generator=generator)
    many = scored_over_draws(spread)
    assert many["standard_error"] > 0.25 / 10**0.5  # what the draws alone say
    assert many["interval"][0] < many["top1"] - many["standard_error"]
    never_wrong = scored_over_draws(torch.ones(10, 50, dtype=torch.bool))
    assert never_wrong["standard_error"] == 0
    assert never_wrong["interval"][0] < 0.95
    grouped = scored_over_draws(alike, groups=torch.arange(400) // 40)
    assert grouped["outcome"].values.shape == (400,)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="5 stands in the table"):
        FewShotSettings(shots=(1, 2))
    with pytest.raises(ValueError, match="two at least"):
        dataclasses.replace(SETTINGS, draws=1)
