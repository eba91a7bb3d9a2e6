from __future__ import annotations

import json
from typing import Any

from launch.report.page import write_report

RESULTS: dict[str, Any] = {
    "kind": "finetune", "task": "one_label", "run": "x", "step": 200, "epoch": 4.0, "chance": 0.5, "headline": "top1",
    "held_out": {"name": "val of shards"}, "classes": ["<b>ant", "bee"], "rare_classes": {"bee": 7},
    "networks": {
        "val": {"top1": 0.8, "loss": 0.51234, "images": 100, "top1_standard_error": 0.04},
        "ema": {"top1": 0.84, "loss": None, "images": 100, "top1_standard_error": 0.036,
                "confusion": [[40, 8], [8, 44]]},
    },
    "best": {"step": 150, "epoch": 3.0, "score": 0.86},
}  # fmt: skip


def test_a_page_says_what_fine_tuning_reached(make_run: Any) -> None:
    run = make_run("x")
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "finetune-00000200.json").write_text(json.dumps(RESULTS))
    page = write_report([run]).read_text()
    for words in ("Step 200, on 100 images", "84.0 ± 3.6", "80.0 ± 4.0", "0.512", "50.0", "step 150 (86.0)", "bee (7)"):
        assert words in page, words
    assert "&lt;b&gt;ant taken for bee: 8 of 48" in page
    assert "could not be read" not in page


def test_what_it_cannot_read_is_told(make_run: Any) -> None:
    run = make_run("x")
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "finetune-00000200.json").write_text(json.dumps({**RESULTS, "networks": 3}))
    assert "is not what fine-tuning writes" in write_report([run]).read_text()
