"""`selfsight probe` on what a field of each sample's .json says, from shards to tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.outcomes import read_outcomes
from eval.probe import run_probe
from eval.report import markdown_table, read_results

GRADES = (0, 1, 2, 3)  # the brightness of an image follows it


@pytest.fixture
def data(tmp_path, write_shard) -> Path:
    """Images whose .json says the same thing in four ways; one has none of them."""

    def said(grade: int) -> dict[str, Any]:
        return {
            "diagnosis": ("healthy", "mild", "severe", "worst")[grade],
            "stage": grade,
            "weight": 50.5 + 10 * grade,
            "tags": [name for name, least in (("ill", 1), ("bad", 2)) if grade >= least],
            "patient": f"p{grade}",
        }

    for split, seed, times in (("train", 0, 16), ("val", 1, 8)):
        grades = GRADES * times
        jsons = [said(grade) for grade in grades]
        jsons[-1] = {"note": "nothing is known"}
        for number, each in enumerate(jsons):
            each["patient"] = f"{split}{number // 4}"
        write_shard(tmp_path / "data" / f"{split}-000000.tar", grades, seed, jsons=jsons)
    return tmp_path / "data"


def quick(target: Path, data: Path, **more: Any) -> dict[str, Any]:
    return run_probe(str(target), str(data), device="cpu", epochs=3, seeds=(0,), progress=False, **more)


@pytest.mark.parametrize(
    ("label", "kind", "found", "columns"),
    [
        ("diagnosis", None, "class", ["k-NN class*", "k-NN mean", "linear"]),
        ("stage", "grade", "grade", ["weighted kappa", "k-NN class*", "k-NN mean", "linear"]),
        ("weight", None, "number", ["ridge R2", "ridge mean error"]),
        ("tags", None, "several", ["k-NN mAP", "logistic mAP"]),
    ],
)
def test_a_field_is_predicted_as_what_it_is(encoder_folder, data, label, kind, found, columns) -> None:
    results = quick(encoder_folder, data, label=label, label_kind=kind)
    assert (results["data"]["label"], results["data"]["label_kind"]) == (label, found)
    assert results["data"]["val"]["num_labelled"] == 31  # of 32, of which one has no such field
    told = read_results(results)
    assert told.columns == columns
    assert [name for name, _ in told.rows] == ["chance", "raw pixels", "untrained", "pretrained"]
    rows = dict(told.rows)
    assert all(value is not None for value in rows["raw pixels"])
    assert told.title.startswith("small, step 20: " + label)
    assert str(rows["raw pixels"][0]) in markdown_table(results)
    assert any(note.startswith(f"label {label} of 94 samples") for note in told.notes)
    (written,) = (encoder_folder / "eval").glob("probe-20-*.json")
    assert json.loads(written.read_text()) == json.loads(json.dumps(results))
    outcomes, ids, groups = read_outcomes(written.with_suffix(".npz"))
    assert len(ids) == 31
    assert groups is None
    assert all(len(outcome) == 31 for outcome in outcomes.values())


def test_brightness_is_told_from_raw_pixels(encoder_folder, data) -> None:
    told = read_results(quick(encoder_folder, data, label="weight"))
    blind, pixels = (dict(told.rows)[row] for row in ("chance", "raw pixels"))
    assert pixels[0].share > 0.8  # R2
    assert pixels[1].share < 0.5 * blind[1].share  # kilograms
    assert str(blind[0]) == "0"


def test_errors_are_of_groups_where_images_belong_together(encoder_folder, data) -> None:
    results = quick(encoder_folder, data, label="diagnosis", group_by="patient")
    assert any("bootstrap over patients" in note for note in read_results(results).notes)
    (written,) = (encoder_folder / "eval").glob("probe-20-*.json")
    groups = read_outcomes(written.with_suffix(".npz"))[2]
    assert groups is not None
    assert len(groups.unique()) == 8


def test_what_can_t_be_predicted_is_refused(encoder_folder, data, tmp_path, write_shard) -> None:
    with pytest.raises(ValueError, match=r"has the field wieght in its \.json; the first have .*weight"):
        quick(encoder_folder, data, label="wieght")
    with pytest.raises(ValueError, match=r"the probe knn is of labels of kind .*, and these are of kind number"):
        quick(encoder_folder, data, label="weight", also=("knn",))
    for split, seed in (("train", 0), ("val", 1)):
        jsons = [{"weight": 7.5, "stage": 1} for _ in range(8)]
        write_shard(tmp_path / "same" / f"{split}-000000.tar", [0, 1] * 4, seed, jsons=jsons)
    with pytest.raises(ValueError, match=r"all 8 train samples have the number 7\.5: nothing to predict"):
        quick(encoder_folder, tmp_path / "same", label="weight")
    with pytest.raises(ValueError, match="train has labels of 1 class"):
        quick(encoder_folder, tmp_path / "same", label="stage")
