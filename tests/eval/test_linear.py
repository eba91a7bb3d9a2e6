"""The linear probe: right gradient, right choice, and no look at val before the choice is made."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eval.linear_heads import Kind, fit
from eval.probes.linear import Head, LinearRecipe, _enough, _finalists, _further, _passes, linear_probe

QUICK = LinearRecipe(learning_rates=(1e-4, 1e-2, 1e-1), epochs=20)


def planted(num, seed, dim=8, num_classes=3, noise=0.5, scale=1.0):
    """Classes on a circle in the first two of `dim` directions: a linear classifier finds them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    features = noise * torch.randn(num, dim, generator=generator)
    angle = labels * 2 * math.pi / num_classes
    features[:, 0] += angle.cos()
    features[:, 1] += angle.sin()
    return features * scale, labels


def fit_one(features, labels, rows, standardised, rates, recipe, seed):
    """Heads of one kind by themselves."""
    return fit({"a": features}, labels, rows, {Kind("a", standardised): rates}, 3, recipe, seed, "cpu")


def test_same_as_torch_sgd_and_cross_entropy():
    features, labels = planted(64, seed=1)
    recipe = LinearRecipe(epochs=3, batch_size=16)
    ours = fit_one(features, labels, torch.arange(64), False, [0.5], recipe, 7)

    generator = torch.Generator().manual_seed(7)
    layer = torch.nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 8, generator=generator) * 0.01)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5 * 16 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for _ in range(3):
        for rows in torch.randperm(64, generator=generator).split(16):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    found = ours.predict({"a": features}, torch.arange(64))
    torch.testing.assert_close(found, layer(features).detach(), rtol=1e-4, atol=1e-5)


def test_heads_side_by_side_are_the_heads_by_themselves():
    features, labels = planted(64, seed=1)
    rows, recipe = torch.arange(64), LinearRecipe(epochs=2, batch_size=16)
    other = features.flip(1) * 3
    rates_of = {Kind("a", True): [0.01, 0.1, 1.0], Kind("a", False): [0.1, 0.02]}
    together = fit({"a": other}, labels, rows, rates_of, 3, recipe, 0, "cpu").score({"a": other}, labels, rows)
    cells = [(kind.standardised, rate) for kind, rates in rates_of.items() for rate in rates]
    for place, (standardised, rate) in enumerate(cells):
        alone = fit_one(other, labels, rows, standardised, [rate], recipe, 0).score({"a": other}, labels, rows)
        assert [values[place] for values in together] == pytest.approx([values[0] for values in alone], rel=1e-5)


def test_passes_are_of_one_input_and_fit_in_memory(monkeypatch):
    features = {"a": torch.zeros(1, 4), "b": torch.zeros(1, 8)}
    wanted = {Kind("a", True): [1, 2], Kind("b", True): [3, 4], Kind("a", False): [5]}
    assert list(_passes(wanted, features, 3)) == [
        {Kind("a", True): [1, 2], Kind("a", False): [5]}, {Kind("b", True): [3, 4]},
    ]  # fmt: skip
    monkeypatch.setattr("eval.probes.linear.MOST_WEIGHTS", 1)  # less than one needs: then one by one
    assert [[*part.values()] for part in _passes(wanted, features, 3)] == [[[1]], [[2]], [[5]], [[3]], [[4]]]


def test_finalists_are_the_best_kinds_at_rates_about_their_best():
    def heads(name, *shares):
        return [Head(name, True, rate, share, 1.0) for rate, share in zip(rates, shares, strict=True)]

    rates = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    screened = {
        Kind("a", True): heads("a", 0.5, 0.5, 0.5, 0.5, 0.70, 0.5),
        Kind("b", True): heads("b", 0.5, 0.72, 0.5, 0.5, 0.5, 0.5),
        Kind("c", True): heads("c", 0.5, 0.5, 0.5, 0.5, 0.5, 0.4),
    }
    recipe = LinearRecipe(learning_rates=rates)
    found = _finalists(screened, recipe, 100)
    assert found == {Kind("b", True): (0.1, 0.2, 0.5), Kind("a", True): (0.2, 0.5, 1.0, 2.0, 5.0)}
    assert list(found) == [Kind("b", True), Kind("a", True)]
    assert list(_finalists(screened, replace(recipe, finalists=1), 100)) == [Kind("b", True)]


def test_the_choice_of_finalists_is_as_good_as_that_of_all():
    features, labels = planted(600, seed=1, dim=16, noise=1.0)
    val, val_labels = planted(2000, seed=2, dim=16, noise=1.0)
    train = {"a": features, "b": features[:, :8] * 7 + 3}
    test = {"a": val, "b": val[:, :8] * 7 + 3}
    quick = LinearRecipe(epochs=30, screening_epochs=3)
    few, every = (
        linear_probe(train, labels, test, val_labels, num_classes=3, recipe=recipe, seeds=(0,))
        for recipe in (quick, replace(quick, screening_epochs=30))
    )
    assert abs(few.top1[0] - every.top1[0]) < 0.02
    assert few.chosen.held_out > every.chosen.held_out - 0.02


def test_the_grid_grows_only_where_that_may_change_the_choice():
    def tried(*shares):
        return [Head("a", True, rate, share, 1.0) for rate, share in zip((0.1, 1.0, 10.0), shares, strict=True)]

    def further(*shares, enough=0.0):
        return _further(tried(*shares), (1e-8, 100.0), enough)

    assert further(0.5, 0.6, 0.7) == [20.0, 50.0, 100.0]
    assert further(0.7, 0.6, 0.5) == [0.05, 0.02, 0.01]
    assert further(0.6, 0.7, 0.5) == []
    assert further(0.5, 0.6, 0.7, enough=0.71) == []  # another input is far better
    assert further(0.5, 0.6, 1.0) == []  # nothing is left to gain
    assert _enough([*tried(0.5, 0.5, 0.5), Head("b", True, 0.1, 0.8, 1.0)], 100) == pytest.approx(0.8 - 3 * 0.04)


def test_standardising_is_batch_norm_without_affine():
    features, labels = planted(64, seed=1, scale=30.0)
    heads = fit_one(features, labels, torch.arange(64), True, [0.1], LinearRecipe(epochs=1), 0)
    norm = torch.nn.BatchNorm1d(8, affine=False, eps=1e-6)
    layer = torch.nn.Linear(8, 3)
    generator = torch.Generator().manual_seed(0)
    layer.weight.data, layer.bias.data = torch.randn(3, 8, generator=generator) * 0.01, torch.zeros(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 * 16 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    standard = norm(features)
    for rows in torch.randperm(64, generator=generator).split(16):
        optimizer.zero_grad()
        F.cross_entropy(layer(standard[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    found = heads.predict({"a": features}, torch.arange(64))
    torch.testing.assert_close(found, layer(standard).detach(), rtol=1e-3, atol=1e-5)


def test_finds_planted_structure_whatever_its_scale():
    for scale in (1e-3, 1.0, 1e3):
        features, labels = planted(600, seed=1, scale=scale)
        val, val_labels = planted(400, seed=2, scale=scale)
        scores = linear_probe({"a": features}, labels, {"a": val}, val_labels, num_classes=3, recipe=QUICK)
        assert min(scores.top1) > 0.9, scores
        assert scores.top5 is None


def test_chooses_on_train_even_where_val_would_choose_otherwise():
    good, labels = planted(600, seed=1)
    poor, _ = planted(600, seed=3)  # other labels: noise
    val, val_labels = planted(400, seed=2)
    val_noise, _ = planted(400, seed=4)
    train = {"good on train": good, "good on val": torch.where(torch.arange(600)[:, None] % 5 < 3, good, poor)}
    test = {"good on train": val_noise, "good on val": val}
    scores = linear_probe(train, labels, test, val_labels, num_classes=3, recipe=QUICK)
    assert scores.chosen.input == "good on train"
    assert max(scores.top1) < 0.6
    alone = {name: {"good on val": features["good on val"]} for name, features in (("train", train), ("val", test))}
    other = linear_probe(alone["train"], labels, alone["val"], val_labels, num_classes=3, recipe=QUICK)
    assert min(other.top1) > max(scores.top1) + 0.2  # a choice on val would have been the other one
    assert scores.best_of_input["good on train"] > scores.best_of_input["good on val"]


def test_val_changes_neither_the_choice_nor_the_heads():
    features, labels = planted(300, seed=1)
    val, val_labels = planted(100, seed=2)
    runs = [
        linear_probe({"a": features}, labels, {"a": val * factor}, val_labels, num_classes=3, recipe=QUICK)
        for factor in (1.0, -1.0)
    ]
    assert runs[0].chosen == runs[1].chosen
    assert runs[0].top1 != runs[1].top1


def test_deterministic_by_seed():
    features, labels = planted(300, seed=1, noise=1.5)
    val, val_labels = planted(300, seed=2, noise=1.5)

    def run(seeds):
        recipe = LinearRecipe(learning_rates=(1e-2,), epochs=1, batch_size=32)
        return linear_probe({"a": features}, labels, {"a": val}, val_labels, num_classes=3, recipe=recipe, seeds=seeds)

    first = run((0, 1, 2))
    torch.randn(5)  # the global generator plays no part
    assert run((0, 1, 2)) == first
    assert len(set(first.top1)) > 1


def test_a_diverged_head_is_never_chosen_and_all_diverged_is_an_error():
    features, labels = planted(300, seed=1)
    recipe = LinearRecipe(learning_rates=(1e-1, 1e38), bounds=(1e-1, 1e38), epochs=2, standardised=(False,))
    scores = linear_probe({"a": features}, labels, {"a": features}, labels, num_classes=3, recipe=recipe)
    assert scores.chosen.learning_rate == 1e-1
    broken = torch.full_like(features, math.nan)
    with pytest.raises(ValueError, match="all 2 linear heads diverged"):
        linear_probe({"a": broken}, labels, {"a": broken}, labels, num_classes=3, recipe=recipe)


def test_errors_name_what_differs():
    features, labels = planted(30, seed=0)
    with pytest.raises(ValueError, match=r"\['a'\] and val \['b'\]"):
        linear_probe({"a": features}, labels, {"b": features}, labels, num_classes=3)
    with pytest.raises(ValueError, match="seeds is empty"):
        linear_probe({"a": features}, labels, {"a": features}, labels, num_classes=3, seeds=())
    with pytest.raises(ValueError, match=r"held_out is 1\.5"):
        LinearRecipe(held_out=1.5)


@pytest.mark.parametrize(("scale", "side"), [(1.0, "larger"), (30.0, "smaller")])
def test_the_grid_grows_to_where_the_best_rate_is_inside(scale, side):
    features, labels = planted(400, seed=1, scale=scale, noise=0.8)
    val, val_labels = planted(200, seed=2, scale=scale, noise=0.8)
    grid = {"larger": (1e-4, 1e-3, 1e-2), "smaller": (1e-2, 1e36, 1e37)}[side]  # at the larger two they diverge

    def probe(**changes):
        recipe = LinearRecipe(grid, standardised=(False,), epochs=20, screening_epochs=20, **changes)
        return linear_probe({"a": features}, labels, {"a": val}, val_labels, num_classes=3, recipe=recipe)

    wide, fixed = probe(bounds=(1e-8, grid[-1] * 1000)), probe(bounds=(grid[0], grid[-1]))
    assert fixed.at_grid_edge
    assert fixed.rates == grid
    assert not wide.at_grid_edge
    assert set(grid) < set(wide.rates)
    assert (wide.chosen.learning_rate > grid[-1]) == (side == "larger")
    assert wide.chosen.held_out >= fixed.chosen.held_out
    bounded = probe(bounds=(grid[0] / 2, grid[-1] * 2))
    assert bounded.rates in ((*grid, 2 * grid[-1]), (grid[0] / 2, *grid))
