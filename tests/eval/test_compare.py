"""Paired comparisons: the same draws for both, matched by image, and what can't be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.compare import compared, rows_of, said, side_of
from eval.outcomes import Outcome, write_outcomes

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(
        name: str,
        outcomes: dict[str, Outcome],
        ids: Tensor,
        *,
        groups: Tensor | None = None,
        val: str = "v",
        columns: tuple[dict[str, Any], ...] = ({"probe": "knn", "name": "knn_class", "title": "k-NN class*"},),
        data: dict[str, Any] | None = None,
    ) -> Path:
        column = {"paths": [["class", "20"]], "headline": True, "key": "top1", "unit": "percent"}
        split = {"checksum": "t", "spec": "shards/"}
        result = {
            "target": {"name": name, "step": 40, "image_size": 32},
            "data": {"train": split, "val": {**split, "checksum": val}, "label": None, **(data or {})},
            "rows": {"pretrained": {}},
            "protocol": {},
            "columns": [{**column, **each} for each in columns],
            "notes": [],
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(result))
        write_outcomes(path.with_suffix(".npz"), outcomes, ids, groups)
        return path

    return write


def right(num: int, share: float, seed: int) -> Tensor:
    return (torch.rand(num, generator=torch.Generator().manual_seed(seed)) < share).float()


def test_pairs_are_matched_by_image_and_drawn_together(write: Write) -> None:
    num = 400
    ours = right(num, 0.6, 0)
    theirs = torch.where(right(num, 0.08, 1) > 0, 1.0, ours)  # right where the other is, and now and then besides
    order = torch.randperm(num, generator=torch.Generator().manual_seed(3))
    a = side_of([write("a", {"knn/class/20": Outcome("mean", ours)}, torch.arange(num))])
    b = side_of([write("b", {"knn/class/20": Outcome("mean", theirs[order])}, order)])
    found = compared(a, b)
    (measure,) = found["measures"]
    assert measure["difference"] == pytest.approx(float((theirs - ours).mean()), abs=1e-6)
    # of a mean, the paired standard error is that of the differences; two separate ones would be five times as wide
    assert measure["standard_error"] == pytest.approx(float((theirs - ours).std()) / num**0.5, rel=0.1)
    assert said(measure) == "second is better"
    assert rows_of(found)[0][-1] == "second is better"
    turned = compared(b, a)["measures"][0]
    assert turned["difference"] == pytest.approx(-measure["difference"])
    assert said(turned) == "first is better"
    same = compared(a, a)["measures"][0]
    assert (same["difference"], same["standard_error"], said(same)) == (0, 0, "no difference shown")


def test_images_that_one_of_them_lacks_and_queries_that_were_drawn_are_left_out(write: Write) -> None:
    values = right(100, 0.5, 0)
    rows = torch.arange(0, 100, 2)
    some = Outcome("mean", values[rows], rows=rows)
    a = side_of([write("a", {"knn/class/20": some}, torch.arange(100))])
    b = side_of([write("b", {"knn/class/20": Outcome("mean", values[10:])}, torch.arange(10, 100))])
    (measure,) = compared(a, b)["measures"]
    assert measure["images"] == 45
    assert measure["difference"] == 0
    assert measure["first"] == pytest.approx(float(values[10::2].mean()))


def test_groups_are_drawn_whole(write: Write) -> None:
    groups = torch.arange(200) // 20
    ours = torch.zeros(200)
    theirs = right(10, 0.5, 5)[groups]  # all images of a group are alike
    a, b = (
        side_of([write(name, {"knn/class/20": Outcome("mean", values)}, torch.arange(200), groups=groups)])
        for name, values in (("a", ours), ("b", theirs))
    )
    found = compared(a, b)
    assert found["measures"][0]["standard_error"] == pytest.approx(float(theirs[::20].std()) / 10**0.5, rel=0.15)
    assert "whole" in found["notes"][0]


def test_an_error_is_better_when_it_falls_and_label_free_measures_claim_nothing(write: Write) -> None:
    columns = (
        {"probe": "age", "name": "age", "title": "age", "paths": [[]], "key": "value", "unit": "number",
         "lower_is_better": True},
        {"probe": "rank", "name": "rank", "title": "rank", "paths": [[]], "key": "value", "label_free": True},
    )  # fmt: skip
    noise = np.random.default_rng(0).random(50, dtype=np.float32)
    a, b = (
        side_of([write(name, {
            "age": Outcome("mean", torch.from_numpy(more + noise)), "rank": Outcome("mean", torch.from_numpy(noise)),
        }, torch.arange(50), columns=columns)])
        for name, more in (("a", 3.0), ("b", 2.0))
    )  # fmt: skip
    age, rank = compared(a, b)["measures"]
    assert said(age) == "second is better"
    assert said({**rank, "interval": [0.1, 0.2]}) == "second is higher"


def test_headlines_of_two_features_are_compared_too(write: Write) -> None:
    values = {"knn/class/20": Outcome("mean", right(60, 0.5, 0)), "knn/mean/20": Outcome("mean", right(60, 0.9, 1))}
    columns = [
        {"probe": "knn", "name": f"knn_{name}", "title": f"k-NN {name}", "paths": [[name, "20"]]}
        for name in ("class", "mean")
    ]
    a, b = (
        side_of([write(name, values, torch.arange(60), columns=tuple(
            {**column, "headline": column["name"] == f"knn_{feature}"} for column in columns
        ))])
        for name, feature in (("a", "class"), ("b", "mean"))
    )  # fmt: skip
    assert [each["title"] for each in compared(a, b)["measures"]] == [
        "k-NN class against k-NN mean", "k-NN class", "k-NN mean",
    ]  # fmt: skip


def test_what_can_not_be_compared_is_refused(write: Write, tmp_path: Path) -> None:
    outcome, ids = {"knn/class/20": Outcome("mean", torch.ones(30))}, torch.arange(30)
    a = side_of([write("a", outcome, ids)])
    with pytest.raises(ValueError, match="different samples to test on"):
        compared(a, side_of([write("b", outcome, ids, val="other")]))
    with pytest.raises(ValueError, match="with label None and b, step 40 with age"):
        compared(a, side_of([write("b", outcome, ids, data={"label": "age"})]))
    with pytest.raises(ValueError, match="no measure of both"):
        compared(a, side_of([write("b", {}, ids)]))
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of `selfsight probe`"):
        side_of([tmp_path / "none.json"])
