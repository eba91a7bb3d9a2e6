"""Retrieval against the definition, query by query, and what it says of data that allow none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval.base import FeatureSet, Store
from eval.outcomes import bootstrap
from eval.probes.retrieval import SPEC, RetrievalSettings, blind_recall, ranked, run
from eval.statistics import blind_average_precision


def features(num: int, seed: int, labels: Tensor) -> FeatureSet:
    values = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))
    values[:, :3] += 1.5 * torch.nn.functional.one_hot(labels % 3, 3) if labels.ndim == 1 else 0
    return FeatureSet({"mean": values}, "mean", labels, torch.arange(num), torch.arange(num))


def store(num_train: int = 60, num_val: int = 21) -> Store:
    train, val = torch.arange(num_train) % 3, torch.arange(num_val) % 3
    return Store(features(num_train, 0, train), features(num_val, 1, val), 3, "mean")


def slowly(train: Tensor, query: Tensor, relevant: Tensor) -> tuple[float, int]:
    similarity = [float(torch.nn.functional.cosine_similarity(row, query, dim=0)) for row in train]
    order = sorted(range(len(train)), key=lambda place: -similarity[place])
    found, precisions = 0, []
    for rank, place in enumerate(order, start=1):
        if relevant[place]:
            found += 1
            precisions.append(found / rank)
    first = next((rank for rank, place in enumerate(order) if relevant[place]), len(train))
    return (sum(precisions) / len(precisions) if precisions else 0.0), first


@pytest.mark.parametrize("several", [False, True])
def test_average_precision_is_that_of_its_definition(monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    monkeypatch.setattr("eval.probes.retrieval._AT_ONCE", 150)  # several chunks, the last of another size
    given = store()
    train, val = given.train.inputs["mean"], given.val.inputs["mean"]
    generator = torch.Generator().manual_seed(5)
    of_train = torch.randint(2, (60, 4), generator=generator) if several else given.train.labels
    of_val = torch.randint(2, (21, 4), generator=generator) if several else given.val.labels.clone()
    if not several:
        of_val[4] = 7  # a class that train lacks
    precision, first = ranked(train, val, (of_train, of_val))
    for place in range(21):
        same = (of_train @ of_val[place]) > 0 if several else of_train == of_val[place]
        expected = slowly(train, val[place], same)
        assert precision[place].item() == pytest.approx(expected[0], abs=1e-6)
        assert first[place].item() == expected[1]


def test_features_that_tell_nothing_apart_gain_nothing() -> None:
    precision, first = ranked(torch.ones(10, 4), torch.ones(1, 4), (torch.arange(10) % 5, torch.tensor([2])))
    assert first.item() == 8
    assert precision.item() == pytest.approx((1 / 9 + 2 / 10) / 2)


def test_its_result_has_errors_and_outcomes_of_the_queries_that_were_drawn() -> None:
    given = store()
    whole, part = (run(given, RetrievalSettings(full=full, most_pairs=1, fewest=9)) for full in (True, False))
    assert (whole["queries"], part["queries"]) == (21, 9)
    outcome, some = (each["mean_average_precision"]["outcome"] for each in (whole, part))
    assert torch.equal(some.values, outcome.values[some.rows])
    score = whole["mean_average_precision"]
    assert score["interval"][0] < score["value"] < score["interval"][1]
    assert score["standard_error"] == pytest.approx(float(bootstrap(outcome).std()))
    assert whole["recall"]["1"]["value"] <= whole["recall"]["5"]["value"] <= whole["recall"]["10"]["value"]
    assert whole["blind"] == pytest.approx(float(blind_average_precision(60, torch.tensor(20))))
    assert "9 of 21" in SPEC.notes(part, RetrievalSettings())[0]
    assert [column.name for column in SPEC.columns(whole, "mean")] == ["retrieval", "recall_1", "recall_5", "recall_10"]


def test_what_is_reached_blindly_is_what_random_features_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 2 + [1] * 8 + [2] * 40)
    queries = torch.arange(3).repeat(1000)
    sets = [
        FeatureSet({"mean": torch.randn(len(each), 64, generator=generator)}, "mean", each, torch.arange(len(each)),
                   torch.arange(len(each)))
        for each in (labels, queries)
    ]  # fmt: skip
    found = run(Store(*sets, 3, "mean"), RetrievalSettings(full=True))
    assert found["blind"] > 1.1 * float((labels.bincount() / 50).mean())  # an order is better than its share
    assert found["mean_average_precision"]["value"] == pytest.approx(found["blind"], abs=0.03)
    for k, blind in found["blind_recall"].items():
        assert found["recall"][k]["value"] == pytest.approx(blind, abs=0.06)
    assert blind_recall(50, torch.tensor([0.0, 45.0]), 10) == 0.5  # nothing to find, nothing to miss
    chances = [column.chance for column in SPEC.columns(found, "mean")]
    assert chances == [found["blind"], *found["blind_recall"].values()]
