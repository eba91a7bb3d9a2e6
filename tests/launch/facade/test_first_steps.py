from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import launch
from pretrain.survival.history import read_history

NOTEBOOK = Path(launch.__file__).parent / "examples" / "first_steps.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    features, results = names["features"], names["results"]
    assert features.values.shape == (60, 192)
    assert sorted(set(features.splits)) == ["train", "val"]
    assert len(features.classes) == 10
    assert (tmp_path / "features.npz").is_file()
    assert len(names["run"].metrics) >= 4
    (started,) = [event for event in read_history(names["run"].folder) if event["event"] == "started"]
    assert started["preset"] == "mae_own_data", "which is in no command, as it was picked"
    assert results["data"]["val"]["num_labelled"] == 20
    assert all(0 <= share <= 1 for share in results.accuracy().values())
