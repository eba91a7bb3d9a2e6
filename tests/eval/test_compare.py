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

from eval.compare import compared, rows_of, said
from eval.outcomes import Outcome, write_outcomes
from eval.sides import Measure, Side, side_of

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


def bare(name: str, values: Tensor, groups: Tensor | None = None) -> Side:
    """Of one share, by images or groups."""
    split = {"checksum": "v", "spec": "shards/"}
    data = {"train": split, "val": split, "group_by": None if groups is None else "patient"}
    result = {"data": data, "target": {"name": name, "step": None}, "protocol": {}}
    column = {"name": "knn", "title": "k-NN", "probe": "knn", "headline": True}
    group_of = None if groups is None else dict(enumerate(groups.tolist()))
    measure = Measure(column, Outcome("mean", values), torch.arange(len(values)))
    return Side(name, (result,), {"knn": measure}, (), group_of)


def test_of_fewer_than_six_that_differ_no_difference_is_said() -> None:
    for num, expected in ((3, "no difference shown"), (5, "no difference shown"), (6, "second is better")):
        found = compared(bare("a", torch.zeros(num)), bare("b", torch.ones(num)))
        assert said(found["measures"][0]) == expected
        assert found["measures"][0]["interval"] == [0 if num < 6 else 1, 1]
        assert any(f"of {num} images only" in note for note in found["notes"])
        assert any("differ in fewer than 6" in note for note in found["notes"]) == (num < 6)
    few = torch.zeros(1000)
    few[:5] = 1  # five of a thousand, all for the same: 2 of 2^5
    found = compared(bare("a", torch.zeros(1000)), bare("b", few))
    assert said(found["measures"][0]) == "no difference shown"
    assert not any("images only" in note for note in found["notes"])


@pytest.mark.parametrize("units", [4, 8, 20])
def test_where_there_is_no_difference_about_one_of_twenty_says_one_or_none_of_few(units: int) -> None:
    """Of groups that are each easier for one of the two at random."""
    groups, generator = torch.arange(units).repeat_interleave(4), torch.Generator().manual_seed(units)
    wrong, num = 0, 300
    for seed in range(num):
        easier = (0.3 * torch.randn(units, generator=generator))[groups]
        noise = torch.randn(2, len(groups), generator=generator) * 0.2
        ours, theirs = noise[0] - easier / 2, noise[1] + easier / 2
        (measure,) = compared(bare("a", ours, groups), bare("b", theirs, groups), seed=seed, draws=250)["measures"]
        wrong += said(measure) != "no difference shown"
        of_unit = (theirs - ours).unflatten(0, (units, 4)).mean(dim=1)
        assert measure["standard_error"] == pytest.approx(float(of_unit.std()) / units**0.5, rel=0.2)
    assert wrong == 0 if units < 6 else 0.01 < wrong / num < 0.09  # 5 % ± 1.3 %


def test_results_of_other_images_and_other_numbers_of_groups_are_joined(write: Write, tmp_path: Path) -> None:
    column = {"paths": [[]], "key": "value"}
    masks = ({**column, "probe": "segmentation", "name": "segmentation", "title": "mIoU"},)
    patients = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).repeat(10) + 4 * torch.arange(80).div(8, rounding_mode="floor")
    labelled = torch.arange(1, 80, 2)
    sides = []
    for name, turned in (("a", False), ("b", True)):
        whole = write(
            f"{name}-masks", {"segmentation": Outcome("mean", right(80, 0.5, int(turned)))}, torch.arange(80),
            groups=patients, columns=masks, data={"label_kind": None, "group_by": "patient"},
        )  # fmt: skip
        part = write(
            f"{name}-knn", {"knn/class/20": Outcome("mean", right(40, 0.5, 2 + turned))}, labelled,
            groups=torch.arange(40).flip(0), data={"label_kind": "class", "group_by": "patient"},
        )  # fmt: skip
        sides.append(side_of([part, whole] if turned else [whole, part]))
    assert sides[0].group_of == sides[1].group_of
    assert len(set(sides[0].group_of.values())) == 40
    found = compared(*sides)
    assert {each["name"]: (each["images"], each["units"]) for each in found["measures"]} == {
        "segmentation": (80, 40), "knn_class": (40, 40),
    }  # fmt: skip
    assert found["groups"]
    grades = write("c", {"knn/class/20": Outcome("mean", torch.ones(40))}, labelled, data={"label_kind": "grade"})
    mixed = side_of([tmp_path / "b-masks.json", grades])
    found = compared(sides[0], mixed)
    assert [each["name"] for each in found["measures"]] == ["segmentation"]
    why = "step 40 was measured with label kind class and c, step 40 with grade in k-NN class"
    assert any(note.startswith("left out: ") and why in note for note in found["notes"])
