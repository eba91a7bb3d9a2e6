"""`selfsight probe RUN --all`: each checkpoint measured once, all of them in one table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launch.all_command import encoders_of, log_overview, overview_table, probe_all


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, milestone in ((10, True), (20, True), (25, False), (30, True)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"state": {"milestone": milestone}}))
    (tmp_path / "config.yaml").write_text("name: photos\n")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"step": 30}))
    (tmp_path / "eval").mkdir()
    return tmp_path


class Measured:
    """Writes a result where a probe would, and remembers what was asked for."""

    def __init__(self, run: Path) -> None:
        self.run, self.asked = run, []

    def __call__(self, target: str, only: list[str]) -> None:
        step = 30 if target == str(self.run) else int(Path(target).name.partition("-")[2])
        self.asked.append((step, only))
        row = {name: {"top1": step / 100, "standard_error": 0.01, "interval": [0.0, 1.0]} for name in only}
        measures = {"confusion": [[5, 1], [0, 6]], "reliability": [{"confidence": 0.8, "accuracy": 0.7, "count": 12}]}
        result = {
            "target": {"name": "photos", "step": step, "image_size": 32},
            "data": {
                "train": {"checksum": "t", "num_labelled": 9}, "val": {"checksum": "v", "num_labelled": 12},
                "num_classes": 2, "label": None, "classes": ["cat", "dog"],
            },
            "rows": {
                "chance": {}, "pretrained": {name: {**each, "measures": measures} for name, each in row.items()},
                "untrained": [], "pixels": {},
            },
            "columns": [{"probe": name, "name": name, "title": name, "paths": [[]], "headline": True} for name in only],
            "protocol": {"seeds": [0], **{name: {} for name in only}}, "notes": [], "warnings": [],
        }  # fmt: skip
        path = self.run / "eval" / f"probe-{step}-{len(self.asked)}.json"
        path.write_text(json.dumps(result))
        path.with_suffix(".npz").touch()


def test_milestones_and_the_final_encoder_are_measured_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [step for step, _ in encoders_of(run)] == [10, 20, 30]
    split = SimpleNamespace
    splits: Any = split(train=split(checksum="t"), val=split(checksum="v"), labels=split(field=None))
    measure = Measured(run)

    def protocol(*names: str) -> Any:
        return split(
            as_json=lambda: {"seeds": [0], **{name: {} for name in names}},
            probes=[(split(name=name), None) for name in names],
        )

    probe_all(run, splits, protocol("knn"), measure, None)
    assert measure.asked == [(10, ["knn"]), (20, ["knn"]), (30, ["knn"])]
    measure.asked.clear()
    measure.asked += [(0, [])] * 3  # other file names
    found = probe_all(run, splits, protocol("knn", "linear"), measure, None)
    assert measure.asked[3:] == [(10, ["linear"]), (20, ["linear"]), (30, ["linear"])]
    assert found is not None
    assert [name for name, _ in found.rows] == ["step 10", "step 20", "step 30"]
    console = Console(width=120, record=True)
    console.print(overview_table(found))
    text = console.export_text()
    assert "30.0 ± 1.0" in text
    assert "best checkpoint: step 30 by" in text

    sent: dict[str, Any] = {}
    monkeypatch.setattr("pretrain.tracking.probes.log_tables", lambda folder, step, tables: sent.update({step: tables}))
    log_overview(run, found)
    assert set(sent[30]) == {
        "probes", "knn_confusion", "knn_reliability", "linear_confusion", "linear_reliability",
    }  # fmt: skip
    assert sent[30]["knn_confusion"][1] == [("cat", "cat", 5), ("cat", "dog", 1), ("dog", "dog", 6)]


def test_what_is_no_run_or_has_nothing_yet_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        encoders_of(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match="no milestone checkpoint and no final encoder"):
        encoders_of(tmp_path)
