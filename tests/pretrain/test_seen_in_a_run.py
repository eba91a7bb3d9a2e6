"""A run of two ranks tells what it computes and where its time goes, and leaves the trace that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_train import rows, run_all
from tiny import config_data

from pretrain.tracking.step_clock import PARTS


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_tells_what_it_computes_and_where_its_time_goes(stage: int, shards: Path, tmp_path: Path) -> None:
    data = config_data("dino", "vit", shards, tmp_path, engine={"zero_stage": stage})
    data["tracking"] |= {"log_every_steps": 2, "profile_steps": [3, 4], "peak_tflops": 0.1}
    told = run_all([data], 2, tmp_path)
    for row in rows(data):
        assert row["tokens_per_second"] == pytest.approx(row["images_per_second"] * (2 * 65 + 2 * 17))
        assert row["mfu"] == pytest.approx(row["teraflops"] / 0.2)
        assert all(row[f"{part}_share"] >= 0 for part in PARTS)
        assert sum(row[f"{part}_share"] for part in PARTS) <= 1.05
        assert row["forward_share"] > 0
        assert row["backward_share"] > 0
    assert [path.name for path in (tmp_path / data["name"] / "profile").iterdir()] == ["steps-3-4.json.gz"]
    assert told.count("a trace of steps 3 to 4 is in") == 1
    assert " tok/s  mfu " in told
