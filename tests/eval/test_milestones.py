"""Probes made in several goes are one result, and checkpoints one table."""

from __future__ import annotations

from typing import Any

import pytest

from eval.milestones import by_checkpoint, merged, overviews, preferred
from eval.report import markdown_table, read_results
from eval.result_files import missing
from eval.result_tables import tables_of
from launch.report.confused import matrix


def result(step: int, started: str = "1", val: str = "v", **scores: float) -> dict[str, Any]:
    """Of probes by name, each with one share; the untrained encoder has half of it."""

    def row(factor: float) -> dict[str, Any]:
        return {
            name: {"top1": factor * share, "standard_error": 0.01, "interval": [0.0, 1.0]}
            for name, share in scores.items()
        }

    return {
        "target": {"name": "photos", "step": step, "image_size": 32},
        "data": {
            "train": {"checksum": "t", "num_labelled": 9}, "val": {"checksum": val, "num_labelled": 9},
            "num_classes": 3,
        },
        "rows": {
            "chance": {"uniform": 0.3, "most_frequent_class": 0.3}, "pretrained": row(1), "untrained": [row(0.5)],
            "pixels": row(0.4),
        },
        "columns": [
            {"probe": name, "name": name, "title": name, "paths": [[]], "headline": True} for name in scores
        ],
        "protocol": {"seeds": [0], "last_blocks": 4, **{name: {"k": 1} for name in scores}},
        "notes": [f"of {name}" for name in scores], "warnings": ["few"], "started": started,
    }  # fmt: skip


def test_probes_of_several_goes_are_one_result_and_the_newest_counts() -> None:
    whole = merged([result(40, "2", linear=0.6), result(40, "1", linear=0.1, knn=0.5)])
    told = read_results(whole)
    rows = {name: [value.share for value in values if value is not None] for name, values in told.rows}
    assert told.columns == ["linear", "knn"]
    assert rows == {
        "chance": [0.3, 0.3], "raw pixels": [0.24, 0.2], "untrained": [0.3, 0.25], "pretrained": [0.6, 0.5],
    }  # fmt: skip
    assert whole["notes"] == ["of linear", "of knn"]
    assert whole["warnings"] == ["few"]


def test_other_data_are_never_merged() -> None:
    found = by_checkpoint([result(40, knn=0.5), result(40, val="other", linear=0.5), result(20, knn=0.4)])
    assert [(each["target"]["step"], each["data"]["val"]["checksum"]) for each in found] == [
        (20, "v"), (40, "v"), (40, "other"),
    ]  # fmt: skip
    assert [len(each["columns"]) for each in found] == [1, 1, 1]


def test_checkpoints_stand_in_one_table_with_the_best_and_what_is_not_told_apart() -> None:
    results = [result(20, knn=0.5, rank=4.0), result(40, knn=0.6, rank=9.0), result(60, knn=0.59, rank=1.0)]
    for each in results:
        each["columns"][1]["label_free"] = True
    results[2]["columns"][0]["title"] = "knn*"  # of a checkpoint whose headline it is
    results += [result(60, linear=0.7), result(60, val="other", knn=0.1)]
    (found,) = overviews(results)
    assert found.columns == ["knn", "rank", "linear"]
    assert [name for name, _ in found.rows] == [
        "chance", "raw pixels", "untrained", "step 20", "step 40", "step 60",
    ]  # fmt: skip
    assert found.best == [[4, 5], [], []]  # of a measure without labels nobody knows; one alone is no best
    assert preferred(found) == ["best checkpoint: step 40, 60 by knn"]
    assert found.rows[3][1][2] is None
    assert "step" not in found.title


def test_less_is_better_of_errors() -> None:
    results = [result(20, age=9.0), result(40, age=3.0)]
    for each in results:
        each["columns"][0] |= {"lower_is_better": True, "unit": "number"}
    (found,) = overviews(results)
    assert found.best == [[len(found.rows) - 1]]


def test_what_was_measured_otherwise_is_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": result(40, knn=0.5), "b": result(40, linear=0.5)}
    monkeypatch.setattr("eval.result_files.read_result", files.__getitem__)
    asked = {"seeds": [0], "last_blocks": 4, "knn": {"k": 1}, "linear": {"k": 2}, "ridge": {}}
    assert missing(files, asked, ["knn", "linear", "ridge"]) == ["linear", "ridge"]
    assert missing(files, {**asked, "seeds": [1]}, ["knn"]) == ["knn"]


def test_checkpoints_measured_with_different_settings_are_told() -> None:
    """And none of them is called the best by that probe."""
    one, two = result(10, linear=0.5, knn=0.5), result(20, linear=0.9, knn=0.6)
    (alike,) = overviews([one, two])
    assert (alike.mixed, alike.best) == ([], [[1 + 2 + 1], [1 + 2 + 1]])
    two["protocol"]["linear"] = {"k": 1, "epochs": 2}
    (found,) = overviews([one, two])
    assert found.mixed == [
        "warning: linear was measured with different settings, so no checkpoint is best: epochs None at step 10; "
        "epochs 2 at step 20"
    ]
    assert found.notes[0] == found.mixed[0]
    assert found.best == [[], [1 + 2 + 1]]


def test_a_table_names_its_data_and_what_was_fine_tuned() -> None:
    told = result(40, linear=0.6)
    told["data"]["val"]["spec"] = "packed/seg/"
    told["target"]["method"] = "finetune"
    found = read_results(told)
    assert found.title == "photos, step 40: top-1 % on 9 val images of seg, 9 to learn from, 3 classes"
    assert (found.ours, found.data) == ("fine-tuned", "seg")
    assert "| fine-tuned | 60.0" in markdown_table(told)
    told["columns"][0]["label_free"] = True
    found = read_results(told)
    assert found.title == "photos, step 40: on 9 train images of seg, without labels"
    assert not any("standard error over val" in note for note in found.notes)


def test_confusions_are_told_by_the_names_of_classes() -> None:
    told = result(40, linear=0.6)
    told["data"]["classes"] = [0, 1]
    measures = {"confusion": [[3, 1], [0, 4]], "names": ["0 cat", "1 dog"]}
    told["rows"]["pretrained"]["linear"]["measures"] = measures
    assert tables_of(told)["linear_confusion"][1][1] == ("0 cat", "1 dog", 1)
    assert "0 cat taken for 1 dog" in str(matrix(measures, told))
