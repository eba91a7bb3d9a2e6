"""A result as earlier versions wrote it, with every key they had, is read as today's are."""

import copy

import pytest

from eval.earlier import as_today
from eval.report import Measured, markdown_table, read_results
from eval.scores import wilson


def shares(top1):
    return {"top1": top1, "top5": 0.9, "standard_error": 0.0049}


def scores(top1, *features):
    by_k = {k: shares(top1) for k in ("10", "20", "100", "200")}
    return {
        "num_train": 50_000,
        "num_val": 10_000,
        "headline": features[0],
        "dim": 192,
        "knn": dict.fromkeys(features, by_k),
        "linear": {
            **shares(top1 + 0.1),
            "top1_of_seed": {"0": 0.51, "1": 0.5, "2": 0.49},
            "std_over_seeds": 0.01,
            "chosen": {
                "input": "class of last 4", "standardised": True, "learning_rate": 0.1, "held_out": 0.52,
                "held_out_loss": 1.4,
            },
            "best_of_input": dict.fromkeys(features, 0.5),
            "at_grid_edge": True,
            "batch_size": 1024,
        },
        "logistic": {
            "input": features[0], **shares(top1 + 0.05), "chosen": 0.1, "held_out": 0.5, "grid": [0.01, 0.1, 1.0],
            "at_grid_edge": False,
        },
    }  # fmt: skip


OLD = {
    "target": {
        "name": "photos", "method": "dino", "step": 4000, "epoch": 10.0, "architecture": {"family": "vit"},
        "image_size": 32, "channels": 3, "bits": 8, "mean": [0.5] * 3, "std": [0.25] * 3,
    },
    "data": {
        "train": {"spec": "shards", "checksum": "a" * 64, "num_labelled": 50_000},
        "val": {"spec": "shards", "checksum": "b" * 64, "num_labelled": 10_000},
        "num_classes": 10,
    },
    "protocol": {
        "ks": [10, 20, 100, 200],
        "temperature": 0.07,
        "linear": {
            "learning_rates": [0.001, 0.01, 0.1], "standardised": [False, True], "epochs": 100, "batch_size": 1024,
            "momentum": 0.9, "held_out": 0.1,
        },
        "seeds": [0, 1, 2],
        "logistic_grid": [0.01, 0.1, 1.0],
        "last_blocks": 4,
        "features": "cached centre crops",
        "untrained_seeds": [0],
        "pixel_size": 32,
    },
    "rows": {
        "chance": {"uniform": 0.1, "most_frequent_class": 0.1},
        "pretrained": scores(0.4, "class", "mean"),
        "untrained": [scores(0.2, "class", "mean")],
        "pixels": scores(0.3, "pixels"),
    },
    "device": "cpu",
    "versions": {"selfsight": "0.1.0"},
    "started": "2026-11-22T00:00:00Z",
    "seconds": 60.0,
}  # fmt: skip


def test_an_earlier_result_reads_as_it_did():
    before = copy.deepcopy(OLD)
    told = read_results(OLD)
    assert before == OLD
    assert told.columns == ["k-NN class*", "k-NN mean", "linear", "logistic"]
    assert told.headlines == [0, 2, 3]
    assert [name for name, _ in told.rows] == ["chance", "raw pixels", "untrained", "pretrained"]
    assert [value.share for value in dict(told.rows)["pretrained"]] == pytest.approx([0.4, 0.4, 0.5, 0.45])
    assert [value.share for value in dict(told.rows)["raw pixels"]] == pytest.approx([0.3, 0.3, 0.4, 0.35])
    assert dict(told.rows)["pretrained"][0] == Measured(0.4, 0.0049, wilson(0.4, 10_000))
    for piece in ("k = 20, T = 0.07", "lr 0.1 x batch / 256, chosen on 10 %", "at the edge", "C 0.1 of 3"):
        assert piece in markdown_table(OLD)


def test_an_earlier_result_without_a_logistic_probe_or_a_spread():
    old = copy.deepcopy(OLD)
    for row in (old["rows"]["pretrained"], *old["rows"]["untrained"], old["rows"]["pixels"]):
        del row["logistic"]
    old["rows"]["pretrained"]["linear"]["std_over_seeds"] = None
    told = read_results(old)
    assert told.columns[-1] == "linear"
    assert any(note.endswith("one seed") for note in told.notes)


def test_todays_result_is_left_alone_and_what_is_none_is_told():
    today = as_today(OLD)
    assert as_today(today) is today
    with pytest.raises(KeyError):
        read_results({"rows": {}})
    with pytest.raises(TypeError):
        read_results({"rows": None})
