"""What a result holds beside its numbers, as tables."""

from __future__ import annotations

from typing import Any

from eval.result_tables import tables_of


def test_tables_of_confusion_reliability_and_classes_of_pixels() -> None:
    bins = [{"confidence": 0.8, "accuracy": 0.7, "count": 12}]
    row: dict[str, Any] = {
        "num_val": 12,
        "linear": {"measures": {"confusion": [[5, 0], [1, 6]], "reliability": bins}},
        "segmentation": {
            "linear": {"of_class": {"0": 0.5, "3": None}},
            "knn": {"of_class": {"0": 0.25, "3": 0.0}},
            "names": {"3": "cat"},
        },
    }
    found = tables_of({"data": {"classes": ["cat"]}, "rows": {"pretrained": row}})
    assert found == {
        "linear_confusion": (("true", "taken for", "images"), [("cat", "cat", 5), ("1", "cat", 1), ("1", "1", 6)]),
        "linear_reliability": (("confidence", "accuracy", "count"), [[0.8, 0.7, 12]]),
        "segmentation_classes": (("class", "linear IoU", "k-NN IoU"), [("0", 0.5, 0.25), ("cat", None, 0.0)]),
    }
